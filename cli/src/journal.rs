//! What `shoal run` needs to go on with an answer after this process was killed: one small file for each
//! answer that runs over the swarm, gone when the answer ended well.
//!
//! ```text
//! $home/journal/<id>   what was asked, one line of JSON        0600, locked while the answer runs
//!                      one line for each token of the answer   what follows the last whole line is dropped
//! ```
//!
//! Only the first line is forced to the disk: tokens that a power cut takes are computed again.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::generation::Generation;
use crate::run_report::Privacy;
use crate::{figures, terminal};

/// What this version writes; a file of another is not read.
pub const VERSION: u32 = 1;
/// Folder in the home directory.
const FOLDER: &str = "journal";
/// Files kept, those written last: each has a prompt in it.
const KEPT_MAX: usize = 16;
/// Whoever did not come back for a week does not come back.
const FORGET_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// A prompt and an answer of some million tokens.
const FILE_BYTES_MAX: u64 = 32 << 20;

/// What was asked, and how: everything that decides the text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    /// [`VERSION`].
    pub version: u32,
    /// The swarm.
    pub swarm: String,
    /// What the model is called there.
    pub model: String,
    /// The model.
    pub model_id: String,
    /// The beginning of the prompt, for people.
    pub title: String,
    /// Whether the answer is printed as token ids.
    pub as_ids: bool,
    /// Who may see the prompt.
    pub privacy: Privacy,
    /// How rows travel between hops.
    pub wire: String,
    /// How tokens are chosen; seed and context are set.
    pub generation: Generation,
    /// The prompt's token ids.
    pub prompt: Vec<u32>,
}

impl Asked {
    /// Titles are cut here.
    pub const TITLE_CHARS_MAX: usize = 60;
}

/// The journal of an answer that runs.
#[derive(Debug)]
pub struct Journal {
    /// What it is called.
    pub id: String,
    /// What was asked.
    pub asked: Asked,
    /// Tokens of the answer that were there when it was opened.
    pub said: Vec<u32>,
    path: PathBuf,
    /// Locked; none after a failure to write.
    file: Option<File>,
}

/// An answer that nobody is waiting for just now.
#[derive(Debug, Serialize)]
pub struct Interrupted {
    /// What to resume.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// The model.
    pub model_id: String,
    /// The swarm.
    pub swarm: String,
    /// The beginning of the prompt.
    pub title: String,
    /// Tokens of the answer so far.
    pub tokens: usize,
    /// Tokens it may have.
    pub max_tokens: u32,
    /// Since the last one was written.
    pub age_s: u64,
}

/// Where they are.
pub fn folder(home: &Path) -> PathBuf {
    home.join(FOLDER)
}

impl Journal {
    /// Begins one, and removes what is too old or too many.
    ///
    /// # Errors
    /// The home cannot be written.
    pub fn begin(home: &Path, asked: Asked) -> io::Result<Self> {
        let folder = folder(home);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        make_room(&folder)?;
        let id = format!("{:08x}", rand::random::<u32>());
        let path = folder.join(&id);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        file.lock()?;
        let mut line = serde_json::to_vec(&asked)?;
        line.push(b'\n');
        file.write_all(&line)?;
        file.sync_data()?;
        File::open(&folder)?.sync_all()?;
        Ok(Self {
            id,
            asked,
            said: Vec::new(),
            path,
            file: Some(file),
        })
    }

    /// Opens that of an interrupted answer, the last one where `id` is none, to be written on.
    ///
    /// # Errors
    /// There is none, another process is at it, or it cannot be read.
    pub fn resume(home: &Path, id: Option<&str>) -> anyhow::Result<Self> {
        let folder = folder(home);
        let Some(id) = id.map(str::to_owned).or_else(|| last(home)) else {
            return Err(Failure::new("no answer was interrupted").into());
        };
        let named = |what: &str| {
            let id = figures::printable(&id, 40);
            Failure::new(format!("{what} `{id}`"))
                .try_this("`shoal run --resume --list` shows what can be resumed")
        };
        // What is typed names a file of this folder and none elsewhere.
        let path = folder.join(&id);
        if !is_id(&id) || !path.is_file() {
            return Err(named("no interrupted answer is called").into());
        }
        let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(named("another process still writes the answer").into());
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let Some((asked, said, whole)) = read(&mut file)? else {
            return Err(named("there is nothing to go on with in").into());
        };
        file.set_len(whole)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self {
            id,
            asked,
            said,
            path,
            file: Some(file),
        })
    }

    /// Notes the next token. A disk that is full is no reason to end an answer: then this says so once, and
    /// what was noted before is kept.
    pub fn push(&mut self, token: u32) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = file.write_all(format!("{token}\n").as_bytes()) {
            terminal::warn(format!(
                "{}: {error}; from here on the answer cannot be resumed",
                self.path.display()
            ));
            self.file = None;
        }
    }

    /// The answer ended well.
    pub fn end(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            terminal::warn(format!("{}: {error}", self.path.display()));
        }
    }
}

/// What can be resumed, the last first.
pub fn interrupted(home: &Path) -> Vec<Interrupted> {
    let files = files(&folder(home)).into_iter();
    files
        .filter_map(|(path, written)| {
            let mut file = File::open(&path).ok()?;
            file.try_lock_shared().ok()?;
            let (asked, said, _) = read(&mut file).ok()??;
            Some(Interrupted {
                id: path.file_name()?.to_str()?.to_owned(),
                model: asked.model,
                model_id: asked.model_id,
                swarm: asked.swarm,
                title: asked.title,
                tokens: said.len(),
                max_tokens: asked.generation.max_tokens,
                age_s: written.elapsed().unwrap_or_default().as_secs(),
            })
        })
        .collect()
}

fn last(home: &Path) -> Option<String> {
    interrupted(home).into_iter().next().map(|last| last.id)
}

fn is_id(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The journals, those written last first.
fn files(folder: &Path) -> Vec<(PathBuf, SystemTime)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<(PathBuf, SystemTime)> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_id))
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.modified().ok()?)))
        .collect();
    files.sort_by_key(|(_, written)| std::cmp::Reverse(*written));
    files
}

/// Room for one more; what another process writes stays.
fn make_room(folder: &Path) -> io::Result<()> {
    for (at, (path, written)) in files(folder).into_iter().enumerate() {
        let old = written.elapsed().is_ok_and(|age| age > FORGET_AFTER);
        if at + 1 < KEPT_MAX && !old {
            continue;
        }
        if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// What was asked, the tokens, and how many bytes of the file are whole lines of that; nothing where the
/// first line is none.
fn read(file: &mut File) -> io::Result<Option<(Asked, Vec<u32>, u64)>> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    let mut lines = bytes.split_inclusive(|b| *b == b'\n');
    let first = lines.next().filter(|line| line.ends_with(b"\n"));
    let asked = first.and_then(|line| serde_json::from_slice::<Asked>(line).ok());
    let (Some(first), Some(asked)) = (first, asked) else {
        return Ok(None);
    };
    if asked.version != VERSION || asked.prompt.is_empty() {
        return Ok(None);
    }
    let mut whole = first.len() as u64;
    let mut said = Vec::new();
    for line in lines {
        let text = line.strip_suffix(b"\n");
        let text = text.and_then(|text| std::str::from_utf8(text).ok());
        let Some(token) = text.and_then(|text| text.parse().ok()) else {
            break;
        };
        whole += line.len() as u64;
        said.push(token);
    }
    Ok(Some((asked, said, whole)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn asked(title: &str) -> Asked {
        Asked {
            version: VERSION,
            swarm: "home".into(),
            model: "demo".into(),
            model_id: "ab".repeat(32),
            title: title.into(),
            as_ids: false,
            privacy: Privacy::Trusted,
            wire: "q8_0".into(),
            generation: Generation {
                max_tokens: 300,
                temp: 0.7,
                top_p: 0.95,
                top_k: 40,
                min_p: 0.05,
                seed: Some(u32::MAX),
                stop: vec!["\nUser:".into()],
                ctx: Some(512),
            },
            prompt: vec![1, 2, 31999],
        }
    }

    /// A journal of a process that was killed after these tokens.
    fn killed(home: &Path, title: &str, tokens: &[u32]) -> PathBuf {
        let mut journal = Journal::begin(home, asked(title)).unwrap();
        tokens.iter().for_each(|token| journal.push(*token));
        journal.path
    }

    #[test]
    fn what_was_written_comes_back_and_goes_on() {
        let home = tempfile::tempdir().unwrap();
        killed(home.path(), "a", &[5, 0, 4_000_000_000]);
        let mut again = Journal::resume(home.path(), None).unwrap();
        assert_eq!(again.said, [5, 0, 4_000_000_000]);
        assert_eq!(format!("{:?}", again.asked), format!("{:?}", asked("a")));
        again.push(8);
        drop(again);
        let last = Journal::resume(home.path(), None).unwrap();
        assert_eq!(last.said, [5, 0, 4_000_000_000, 8]);
        last.end();
        assert!(interrupted(home.path()).is_empty());
        assert!(Journal::resume(home.path(), None).is_err());
    }

    #[test]
    fn a_torn_end_is_dropped_wherever_it_is_torn() {
        let home = tempfile::tempdir().unwrap();
        let path = killed(home.path(), "a", &[123, 456]);
        let bytes = fs::read(&path).unwrap();
        let first = bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
        for cut in 0..bytes.len() {
            fs::write(&path, &bytes[..cut]).unwrap();
            let resumed = Journal::resume(home.path(), path.file_name().unwrap().to_str());
            if cut < first {
                assert!(resumed.is_err(), "cut at {cut}");
                continue;
            }
            let mut resumed = resumed.unwrap();
            assert_eq!(
                resumed.said,
                [123, 456][..(cut - first) / 4],
                "cut at {cut}"
            );
            resumed.push(7);
            let said = resumed.said.clone();
            drop(resumed);
            let again = Journal::resume(home.path(), None).unwrap();
            assert_eq!(again.said, [&said[..], &[7]].concat(), "cut at {cut}");
        }
        // Blocks that were never written read as zeros.
        for end in [
            &b"\0\0\0\0\n9\n"[..],
            b"99999999999\n1\n",
            b"-1\n1\n",
            b"\xff\n1\n",
        ] {
            fs::write(&path, [&bytes, end].concat()).unwrap();
            assert_eq!(
                Journal::resume(home.path(), None).unwrap().said,
                [123, 456],
                "{end:?}"
            );
        }
    }

    #[test]
    fn a_journal_is_private_and_its_folder_too() {
        let home = tempfile::tempdir().unwrap();
        let path = killed(home.path(), "a", &[]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&folder(home.path())), 0o700);
    }

    #[test]
    fn few_are_kept_and_not_for_long_but_none_that_is_in_use() {
        let home = tempfile::tempdir().unwrap();
        let first = Journal::begin(home.path(), asked("runs")).unwrap();
        let stale = killed(home.path(), "stale", &[1]);
        let week = SystemTime::now() - FORGET_AFTER - Duration::from_secs(9);
        let file = OpenOptions::new().write(true).open(&stale).unwrap();
        file.set_modified(week).unwrap();
        drop(file);
        for n in 0..KEPT_MAX + 4 {
            let path = killed(home.path(), &n.to_string(), &[]);
            let when = SystemTime::now() - Duration::from_secs(1000 - n as u64);
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.set_modified(when).unwrap();
        }
        assert!(!stale.exists());
        assert!(first.path.exists());
        let titles: Vec<String> = interrupted(home.path())
            .into_iter()
            .map(|it| it.title)
            .collect();
        let newest: Vec<String> = (0..KEPT_MAX + 4).rev().map(|n| n.to_string()).collect();
        assert!(titles.len() < KEPT_MAX, "{titles:?}");
        assert_eq!(titles, newest[..titles.len()]);
        // What runs is neither offered nor taken.
        assert!(Journal::resume(home.path(), Some(&first.id)).is_err());
        first.end();
    }

    #[test]
    fn a_name_that_is_no_id_opens_nothing() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("00000000"), b"x").unwrap();
        fs::create_dir_all(folder(home.path())).unwrap();
        for id in ["../00000000", "", ".", "00000000", "nosuchid"] {
            let error = Journal::resume(home.path(), Some(id)).unwrap_err();
            assert!(
                error.to_string().contains("no interrupted answer"),
                "{error}"
            );
        }
    }
}
