//! `shoal top` for real: in a pseudo-terminal, as one frame, as data, over a server and as a member of the swarm.
//!
//! The pseudo-terminal is that of `script`, which every Linux has; elsewhere that part is left out.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testnet::binaries::Binaries;
use testnet::client::Client;
use tests::browser::{self, Browser};
use tests::http::{Api, keep_asking};
use tests::{FOUR_SPANS, PATIENCE, command, repository, serve, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::time::timeout;

/// A command in a terminal of 24 lines.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    out: ChildStdout,
    bytes: Vec<u8>,
    said: String,
}

impl Terminal {
    fn start(
        folder: &std::path::Path,
        columns: u32,
        args: &[String],
        no_color: bool,
    ) -> Result<Self> {
        let shoal = Binaries::beside_this_program()?.shoal;
        let quoted: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
        let line = format!(
            "stty rows 24 cols {columns}; exec '{}' {}",
            shoal.display(),
            quoted.join(" ")
        );
        let mut script = command(std::path::Path::new("script"), folder);
        script
            .args(["-qefc", &line, "/dev/null"])
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(Stdio::piped())
            .stderr(Stdio::inherit());
        if no_color {
            script.env("NO_COLOR", "1");
        }
        let mut child = script.spawn()?;
        Ok(Self {
            keys: child.stdin.take().context("no stdin")?,
            out: child.stdout.take().context("no stdout")?,
            child,
            bytes: Vec::new(),
            said: String::new(),
        })
    }

    /// Reads on until the screen shows `words`.
    async fn until(&mut self, words: &str) -> Result<()> {
        while !shown(&self.said).contains(words) {
            let mut bytes = [0; 4096];
            let read = timeout(PATIENCE, self.out.read(&mut bytes)).await;
            let n = read.with_context(|| format!("no {words:?}:\n{}", shown(&self.said)))??;
            ensure!(n > 0, "it ended without {words:?}: {}", self.said);
            self.bytes.extend_from_slice(&bytes[..n]);
            self.said = String::from_utf8_lossy(&self.bytes).into_owned();
        }
        Ok(())
    }

    async fn press(&mut self, keys: &str) -> Result<()> {
        self.keys.write_all(keys.as_bytes()).await?;
        Ok(self.keys.flush().await?)
    }

    /// What it wrote until it ended well.
    async fn end(mut self) -> Result<String> {
        let mut rest = Vec::new();
        timeout(PATIENCE, self.out.read_to_end(&mut rest)).await??;
        let ended = timeout(PATIENCE, self.child.wait()).await??;
        ensure!(ended.success(), "it ended with {ended}");
        Ok(self.said + &String::from_utf8_lossy(&rest))
    }
}

/// What is on a screen after all that was written: where the cursor was sent, and letters.
fn shown(said: &str) -> String {
    let mut grid = vec![vec![' '; 200]; 60];
    let (mut row, mut column) = (0, 0);
    let mut rest = said.chars();
    while let Some(letter) = rest.next() {
        if letter != '\u{1b}' {
            if let Some(cell) = grid.get_mut(row).and_then(|line| line.get_mut(column)) {
                *cell = letter;
            }
            column += 1;
            continue;
        }
        if rest.next() != Some('[') {
            continue;
        }
        let mut numbers = String::new();
        let end = rest.find(|letter| {
            let ends = letter.is_ascii_alphabetic();
            if !ends {
                numbers.push(*letter);
            }
            ends
        });
        let mut at = numbers
            .split(';')
            .map(|n| n.parse::<usize>().unwrap_or(1).saturating_sub(1));
        match end {
            Some('H') => (row, column) = (at.next().unwrap_or(0), at.next().unwrap_or(0)),
            Some('J') => grid.iter_mut().for_each(|line| line.fill(' ')),
            _ => {}
        }
    }
    let lines: Vec<String> = grid.iter().map(|line| line.iter().collect()).collect();
    lines.join("\n")
}

fn top(client: &Client, more: &[&str]) -> Vec<String> {
    let mut args = vec!["top".to_owned()];
    args.extend(client.swarm_args());
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

#[tokio::test]
async fn it_shows_the_swarm_and_gives_the_terminal_back() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &["--api-key", "one,two"]).await?;
    let address = api.url.clone();
    let url = ["--url", &address, "--api-key", "two"];

    one_frame_and_data(&client, &url).await?;
    if cfg!(target_os = "linux") {
        in_a_terminal(&swarm, &client, &url).await?;
    }
    api.stop(Duration::from_secs(20)).await?;
    let gone = client.output(&top(&client, &url), PATIENCE).await?;
    ensure!(!gone.status.success(), "{}", gone.stdout);
    swarm.stop().await;
    Ok(())
}

async fn one_frame_and_data(client: &Client, url: &[&str]) -> Result<()> {
    // Standard output is a pipe here.
    let refused = client.output(&top(client, &[]), PATIENCE).await?;
    ensure!(
        refused.stderr.contains("no terminal") && refused.stderr.contains("--once"),
        "{}",
        refused.stderr
    );
    for more in [&[][..], url] {
        let flags = [&["--once"], more].concat();
        let frame = until("four peers and no gap", PATIENCE, async || {
            let frame = client.output(&top(client, &flags), PATIENCE).await.ok()?;
            (frame.stdout.contains("4 holders") && frame.stdout.contains("complete"))
                .then_some(frame)
        });
        let frame = frame.await?.stdout;
        ensure!(
            frame.contains("████") && frame.contains("copies"),
            "{frame}"
        );
        ensure!(!frame.contains('\u{1b}'), "{frame}");
        let flags = [&["--json"], more].concat();
        let view: Value = client.json(&top(client, &flags), PATIENCE).await?;
        ensure!(view["models"][0]["n_layer"] == 8, "{view}");
        ensure!(view["peers"].as_array().map(Vec::len) == Some(4), "{view}");
    }
    let keyless = ["--json", "--url", url[1]];
    let refused = client.output(&top(client, &keyless), PATIENCE).await?;
    ensure!(
        refused.stdout.contains("asks for a key") || refused.stderr.contains("asks for a key"),
        "{refused:?}"
    );
    let nonsense = client
        .output(&top(client, &["--once", "--url", "ftp://x"]), PATIENCE)
        .await?;
    ensure!(
        nonsense.stderr.contains("not the address of a server"),
        "{}",
        nonsense.stderr
    );
    Ok(())
}

async fn in_a_terminal(swarm: &testnet::swarm::Swarm, client: &Client, url: &[&str]) -> Result<()> {
    let mut screen = Terminal::start(swarm.folder(), 80, &top(client, url), false)?;
    screen.until("copies").await?;
    ensure!(screen.said.contains("\u{1b}[?1049h"), "{:?}", screen.said);
    screen.until("0 running").await?;
    screen.press("?").await?;
    screen.until("Ctrl-C").await?;
    screen.press("?\r").await?;
    screen.until("seen from here").await?;
    screen.until("used for").await?;
    screen.press("\u{1b}").await?;
    screen.until("copies").await?;
    screen.press("q").await?;
    let said = screen.end().await?;
    ensure!(
        said.contains("\u{1b}[?1049l") && said.contains("\u{1b}[?25h"),
        "{said:?}"
    );

    // Without colours, as a member of the swarm, and ended by Ctrl-C.
    let mut screen = Terminal::start(swarm.folder(), 100, &top(client, &[]), true)?;
    screen.until("copies").await?;
    screen.until("requests are known to the server").await?;
    for colour in ["\u{1b}[31m", "\u{1b}[32m", "38;5;"] {
        ensure!(!screen.said.contains(colour), "{:?}", screen.said);
    }
    screen.press("\u{3}").await?;
    let said = screen.end().await?;
    ensure!(said.contains("\u{1b}[?1049l"), "{said:?}");
    Ok(())
}

/// With SHOAL_PICTURES set: a picture of the terminal, drawn by the browser from what tmux shows.
#[tokio::test]
async fn what_the_picture_shows() -> Result<()> {
    let (Some(folder), Some(program)) = (std::env::var_os("SHOAL_PICTURES"), browser::program())
    else {
        return Ok(());
    };
    let folder = repository().join(folder);
    std::fs::create_dir_all(&folder)?;
    let spans = [
        "0..3", "2..5", "4..7", "6..8", "0..4", "3..8", "1..6", "5..8", "0..2",
    ];
    let mut swarm = serve("demo", &spans, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Arc::new(Api::start(&swarm.client("api"), &[]).await?);
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    let _running = keep_asking(&api, 2);
    let args = top(&client, &["--url", &api.url]).join(" ");
    let shoal = Binaries::beside_this_program()?.shoal;
    let socket = swarm.folder().join("tmux").display().to_string();
    let tmux = async |args: &[&str]| -> Result<String> {
        let done = tokio::process::Command::new("tmux")
            .args(["-S", &socket])
            .args(args)
            .output()
            .await?;
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    };
    let line = format!("{} {args}", shoal.display());
    tmux(&["-u", "new-session", "-d", "-x", "110", "-y", "24", &line]).await?;
    let shown = until("both requests answer", PATIENCE, async || {
        let shown = tmux(&["capture-pane", "-e", "-p"]).await.ok()?;
        (shown.matches("answers").count() >= 2 && !shown.contains(" 0 tokens/s")).then_some(shown)
    });
    let shown = shown.await;
    tmux(&["kill-server"]).await?;
    let shown = shown?;
    let page = swarm.folder().join("top.html");
    std::fs::File::create(&page)?.write_all(html(&shown).as_bytes())?;
    let mut browser = Browser::start(&program, 960, 466).await?;
    browser.open(&format!("file://{}", page.display())).await?;
    browser.until("document.querySelector('pre')").await?;
    browser.picture(&folder.join("top.png")).await?;
    browser.close().await?;
    swarm.stop().await;
    Ok(())
}

/// A terminal's text as a page: colours and weights as a dark terminal has them.
fn html(shown: &str) -> String {
    let mut out = String::from(
        "<!doctype html><meta charset=utf-8><style>body{margin:0;background:#0b1216;padding:14px}\
         pre{margin:0;font:14px/1.3 'DejaVu Sans Mono',monospace;color:#d5e0e6}\
         .c31{color:#ff7b72}.c32{color:#53c78a}.c33{color:#e5b04a}.c36{color:#5cc8dc}\
         .m1{font-weight:700}.m2{color:#7f929c}.m7{background:#d5e0e6;color:#0b1216}.m7.c31{background:#ff7b72}</style><pre>",
    );
    let mut codes: Vec<String> = Vec::new();
    let mut rest = shown;
    while let Some(at) = rest.find('\u{1b}') {
        out += &span(&rest[..at], &codes);
        let after = &rest[at + 1..];
        let Some(end) = after.find('m').filter(|_| after.starts_with('[')) else {
            rest = after;
            continue;
        };
        // A colour of the first sixteen by its number is the colour.
        let plain = after[1..end].replace("38;5;", "3").replace("48;5;", "4");
        for code in plain.split(';') {
            match code {
                "0" | "" => codes.clear(),
                "39" => codes.retain(|known| !known.starts_with('c')),
                "22" | "27" => codes.retain(|known| !known.starts_with('m')),
                "1" | "2" | "7" => codes.push(format!("m{code}")),
                "31" | "32" | "33" | "36" => {
                    codes.retain(|known| !known.starts_with('c'));
                    codes.push(format!("c{code}"));
                }
                _ => {}
            }
        }
        rest = &after[end + 1..];
    }
    out + &span(rest, &codes) + "</pre>"
}

fn span(text: &str, codes: &[String]) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    match codes {
        [] => text,
        codes => format!("<span class=\"{}\">{text}</span>", codes.join(" ")),
    }
}
