//! Servers on this machine: a hub that speaks Hugging Face's API with a store of its own for the bytes, each
//! with a log of what was asked, and with faults.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests
#![allow(dead_code)] // each test binary uses its part

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use download::{DownloadError, Settings, Source, Token, obtain};
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "owner/repo";

/// A request, as far as a test asks for it.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    pub if_range: Option<String>,
}

/// What a server does.
#[derive(Default)]
pub struct Plan {
    /// By path on this server.
    pub bodies: HashMap<String, Vec<u8>>,
    /// Of the hub: files of the repository.
    pub files: Vec<String>,
    /// Of the hub: where the bytes are; empty: with itself.
    pub store: String,
    /// Only with this token.
    pub token: Option<String>,
    /// What refusals are called.
    pub refusal: Option<(u16, &'static str)>,
    /// Connections that are cut after so many bytes of the body, the next one first.
    pub cuts: Vec<usize>,
    /// Cut connections are not closed, they say nothing more.
    pub silent: bool,
    /// SHA-256 that is announced instead of the right one.
    pub announced: Option<String>,
    /// ETag of plain files.
    pub etag: String,
    /// Ranges are not known here.
    pub no_ranges: bool,
    /// The header of lengths is left out.
    pub no_length: bool,
    /// Length that the hub announces instead of the right one.
    pub size: Option<u64>,
    /// Where `/moved.gguf` is now.
    pub moved: Option<String>,
    pub log: Vec<Asked>,
}

/// A server on a port of its own; it ends with the process.
#[derive(Clone)]
pub struct Server {
    pub address: String,
    plan: Arc<Mutex<Plan>>,
}

impl Server {
    pub fn start(plan: Plan) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let plan = Arc::new(Mutex::new(plan));
        let shared = Arc::clone(&plan);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let plan = Arc::clone(&shared);
                // A client that leaves is the test's own doing.
                std::thread::spawn(move || serve(&stream, &plan).unwrap_or_default());
            }
        });
        Server { address, plan }
    }

    pub fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap()
    }

    /// Requests so far, and forgets them.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.plan().log)
    }
}

fn serve(stream: &TcpStream, plan: &Mutex<Plan>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let asked = Asked {
        method: method.into(),
        path: path.into(),
        range: headers.get("range").cloned(),
        token: headers.get("authorization").cloned(),
        if_range: headers.get("if-range").cloned(),
    };
    let answer = {
        let mut plan = plan.lock().unwrap();
        plan.log.push(asked.clone());
        answer(&mut plan, &asked)
    };
    let mut out = stream;
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    out.write_all(format!("{head}\r\n").as_bytes())?;
    if method != "HEAD" {
        out.write_all(&answer.body)?;
    }
    out.flush()?;
    if answer.silent {
        // Until the client leaves.
        let _ = out.read(&mut [0]);
    }
    Ok(())
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    silent: bool,
}

fn plain(status: u16) -> Answer {
    Answer {
        status,
        headers: vec![("content-length", "0".into())],
        body: vec![],
        silent: false,
    }
}

fn answer(plan: &mut Plan, asked: &Asked) -> Answer {
    let expected = plan.token.as_ref().map(|token| format!("Bearer {token}"));
    if expected.is_some() && expected != asked.token {
        let (status, code) = plan.refusal.unwrap_or((401, "RepoNotFound"));
        let mut refusal = plain(status);
        refusal.headers.push(("X-Error-Code", code.into()));
        return refusal;
    }
    if let Some(rest) = asked.path.strip_prefix(&format!("/{REPO}/resolve/")) {
        return resolve(plan, rest);
    }
    if asked
        .path
        .starts_with(&format!("/api/models/{REPO}/revision/"))
    {
        let files = plan
            .files
            .iter()
            .map(|name| format!(r#"{{"rfilename":"{name}"}}"#));
        let files: Vec<_> = files.collect();
        let body = format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, files.join(","));
        return Answer {
            status: 200,
            headers: vec![("content-length", body.len().to_string())],
            body: body.into_bytes(),
            silent: false,
        };
    }
    let path = asked.path.split('?').next().unwrap_or("");
    if let Some(moved) = plan.moved.clone().filter(|_| path == "/moved.gguf") {
        let mut answer = plain(302);
        answer.headers.push(("location", moved));
        return answer;
    }
    match plan.bodies.get(path).cloned() {
        Some(body) => bytes(plan, asked, body),
        None => plain(404),
    }
}

/// The hub's redirect to the bytes.
fn resolve(plan: &Plan, rest: &str) -> Answer {
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    let known = ["main", "refs%2Fpr%2F1", COMMIT].contains(&revision);
    let body = plan.bodies.get(&format!("/store/{file}"));
    let mut answer = plain(302);
    let code = if known {
        "EntryNotFound"
    } else {
        "RevisionNotFound"
    };
    let (true, Some(body)) = (known, body) else {
        answer.status = 404;
        answer.headers.push(("X-Error-Code", code.into()));
        return answer;
    };
    let sha256 = plan.announced.clone().unwrap_or_else(|| sha256(body));
    answer.headers.extend([
        ("X-Repo-Commit", COMMIT.to_owned()),
        ("X-Linked-Etag", format!("\"{sha256}\"")),
        (
            "X-Linked-Size",
            plan.size.unwrap_or(body.len() as u64).to_string(),
        ),
        ("ETag", "\"other\"".to_owned()),
        (
            "Location",
            format!("{}/store/{file}?signed=yes", plan.store),
        ),
    ]);
    answer
}

fn bytes(plan: &mut Plan, asked: &Asked, body: Vec<u8>) -> Answer {
    let total = body.len();
    let range = asked.range.as_ref().filter(|_| !plan.no_ranges);
    let same = asked
        .if_range
        .as_ref()
        .is_none_or(|mark| *mark == plan.etag);
    let start = range.filter(|_| same).and_then(|range| {
        let from = range.strip_prefix("bytes=")?.strip_suffix('-')?;
        from.parse::<usize>().ok()
    });
    let mut body = body[start.unwrap_or(0)..].to_vec();
    let mut headers = vec![];
    if !plan.no_length {
        headers.push(("content-length", body.len().to_string()));
    }
    if !plan.etag.is_empty() {
        headers.push(("etag", plan.etag.clone()));
    }
    if let Some(start) = start {
        headers.push((
            "content-range",
            format!("bytes {start}-{}/{total}", total - 1),
        ));
    }
    let cut = asked.method == "GET" && !plan.cuts.is_empty();
    if cut {
        body.truncate(plan.cuts.remove(0));
    }
    Answer {
        status: if start.is_some() { 206 } else { 200 },
        headers,
        body,
        silent: cut && plan.silent,
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that say where they belong.
pub fn body(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// A hub, the store that it sends clients to, and an empty cache.
pub struct World {
    pub hub: Server,
    pub store: Server,
    pub dir: tempfile::TempDir,
    pub settings: Settings,
}

impl World {
    pub fn new(files: &[(&str, Vec<u8>)]) -> World {
        let bodies = files
            .iter()
            .map(|(name, body)| (format!("/store/{name}"), body.clone()));
        let bodies: HashMap<_, _> = bodies.collect();
        let store = Server::start(Plan {
            bodies: bodies.clone(),
            ..Plan::default()
        });
        let hub = Server::start(Plan {
            bodies,
            files: files.iter().map(|(name, _)| (*name).into()).collect(),
            store: store.address.clone(),
            ..Plan::default()
        });
        let dir = tempfile::tempdir().unwrap();
        let vars = |name: &str| match name {
            "HF_ENDPOINT" => Some(hub.address.clone()),
            "HF_HUB_CACHE" => Some(dir.path().join("hub").display().to_string()),
            "HF_HOME" => Some(dir.path().join("no-token").display().to_string()),
            _ => None,
        };
        let mut settings = Settings::new(dir.path(), vars).unwrap();
        settings.pause = Duration::from_millis(1);
        World {
            hub,
            store,
            dir,
            settings,
        }
    }

    pub fn token(&mut self, token: &str) {
        self.settings.token = Token::new(token);
    }

    pub fn obtain(&self, source: &str) -> Result<PathBuf, DownloadError> {
        let source: Source = source.parse().unwrap();
        obtain(&source, &self.settings, &mut |_| {})
    }

    /// The repository's folder in the cache.
    pub fn cache(&self) -> PathBuf {
        self.settings.cache.join("models--owner--repo")
    }

    /// Paths asked of the store for bytes.
    pub fn fetched(&self) -> Vec<Asked> {
        let asked = self.store.asked().into_iter();
        asked.filter(|asked| asked.method == "GET").collect()
    }
}

/// Every file below a folder, links too.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}
