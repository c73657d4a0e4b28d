//! Chromium without a window, told what to do over a pipe of its own (the DevTools protocol): opens a page, runs lines
//! of its language in it, presses keys, takes pictures.
//!
//! ```text
//! test ─▶ fifo ─▶ fd 3 of chromium      messages are JSON, a zero byte ends each
//!      ◀─ fifo ◀─ fd 4
//! ```
//! It has an empty profile, speaks to nobody but the server that is tested, and goes when it is dropped.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::{PATIENCE, until};

/// What Debian, others and macOS call it; `SHOAL_CHROMIUM` names another.
const NAMES: [&str; 5] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
];

/// A browser with one page.
pub struct Browser {
    child: Child,
    say: pipe::Sender,
    hear: BufReader<pipe::Receiver>,
    /// The page's session.
    session: String,
    last: u64,
    /// What the page said went wrong, and what it asked of whom.
    pub events: Vec<Value>,
    _folder: TempDir,
}

/// The browser's program, where there is one.
pub fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("SHOAL_CHROMIUM") {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut all = NAMES
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    all.find(|program| program.is_file())
}

impl Browser {
    /// Starts it with an empty page of this size in pixels.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(program: &Path, width: u32, height: u32) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("shoal-browser-")
            .tempdir()?;
        let (to, from) = (folder.path().join("to"), folder.path().join("from"));
        for fifo in [&to, &from] {
            let made = std::process::Command::new("mkfifo").arg(fifo).status()?;
            ensure!(made.success(), "mkfifo failed");
        }
        // Both ends open at once: a fifo waits for its other side.
        let both = |path: &Path| {
            pipe::OpenOptions::new()
                .read_write(true)
                .open_receiver(path)
        };
        let hear = both(&from)?;
        let say = pipe::OpenOptions::new().read_write(true).open_sender(&to)?;
        let profile = folder.path().join("profile");
        let script = "exec \"$0\" \"$@\" 3<\"$SHOAL_TO\" 4>\"$SHOAL_FROM\"";
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
            ])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(format!("--window-size={width},{height}"))
            .env("SHOAL_TO", &to)
            .env("SHOAL_FROM", &from)
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the browser")?;
        let mut browser = Self {
            child,
            say,
            hear: BufReader::new(hear),
            session: String::new(),
            last: 0,
            events: Vec::new(),
            _folder: folder,
        };
        let made = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let target = made.await?["targetId"].clone();
        let attach = json!({"targetId": target, "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await?;
        browser.session = attached["sessionId"]
            .as_str()
            .context("no session")?
            .to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await?;
        }
        browser.resize(width, height).await?;
        Ok(browser)
    }

    /// Another size of the page; a narrow one is a phone's.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size)
            .await?;
        Ok(())
    }

    /// What the system prefers: `dark` or `light`.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn prefer(&mut self, scheme: &str) -> Result<()> {
        let feature = json!({"name": "prefers-color-scheme", "value": scheme});
        self.call("Emulation.setEmulatedMedia", json!({"features": [feature]}))
            .await?;
        Ok(())
    }

    /// Opens an address.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn open(&mut self, url: &str) -> Result<()> {
        self.call("Page.navigate", json!({"url": url})).await?;
        Ok(())
    }

    /// What an expression of the page's language is; promises are waited for.
    ///
    /// # Errors
    /// It throws.
    pub async fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let what = json!({"expression": expression, "returnByValue": true, "awaitPromise": true, "userGesture": true});
        let done = self.call("Runtime.evaluate", what).await?;
        ensure!(
            done["exceptionDetails"].is_null(),
            "{expression}: {}",
            done["exceptionDetails"]
        );
        Ok(done["result"]["value"].clone())
    }

    /// The text of the first element that a selector finds; empty where there is none.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn text(&mut self, selector: &str) -> Result<String> {
        let asked = format!("document.querySelector({selector:?})?.innerText ?? ''");
        let said = self.evaluate(&asked).await?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until an expression is true.
    ///
    /// # Errors
    /// It does not become so in time; what the page shows then is quoted.
    pub async fn until(&mut self, expression: &str) -> Result<()> {
        let asked = format!("Boolean({expression})");
        let seen = until(expression, PATIENCE, async || {
            (self.evaluate(&asked).await.ok()? == true).then_some(())
        });
        match seen.await {
            Ok(()) => Ok(()),
            Err(error) => {
                let shown = self.text("body").await.unwrap_or_default();
                bail!("{error}; the page shows:\n{shown}\n{:?}", self.errors())
            }
        }
    }

    /// Presses a key by its name.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Enter" => 13,
            "Escape" => 27,
            "Tab" => 9,
            _ => 0,
        };
        let text = (key == "Enter").then_some("\r");
        for kind in ["keyDown", "keyUp"] {
            let mut event =
                json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if let (Some(text), "keyDown") = (text, kind) {
                event["text"] = json!(text);
            }
            self.call("Input.dispatchKeyEvent", event).await?;
        }
        Ok(())
    }

    /// Types text where the focus is.
    ///
    /// # Errors
    /// The browser does not do it.
    pub async fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).await?;
        Ok(())
    }

    /// Puts a picture of the page into a file.
    ///
    /// # Errors
    /// The browser does not do it, or the file cannot be written.
    pub async fn picture(&mut self, file: &Path) -> Result<()> {
        let shot = self
            .call("Page.captureScreenshot", json!({"format": "png"}))
            .await?;
        let data = shot["data"].as_str().context("no picture")?;
        std::fs::write(file, of_base64(data)?)?;
        Ok(())
    }

    /// What went wrong in the page so far: exceptions, errors of the console, what its rules forbade.
    pub fn errors(&self) -> Vec<&Value> {
        let wrong = |event: &&Value| match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => event["params"]["type"] == "error",
            Some("Log.entryAdded") => event["params"]["entry"]["level"] == "error",
            _ => false,
        };
        self.events.iter().filter(wrong).collect()
    }

    /// Everything that the page asked for, wherever.
    pub fn asked(&self) -> Vec<&str> {
        let sent = self.events.iter();
        let sent = sent.filter(|event| event["method"] == "Network.requestWillBeSent");
        sent.filter_map(|event| event["params"]["request"]["url"].as_str())
            .collect()
    }

    async fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": params});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.say.write_all(&bytes).await?;
        loop {
            let mut bytes = Vec::new();
            let heard = timeout(PATIENCE, self.hear.read_until(0, &mut bytes)).await;
            heard.with_context(|| format!("the browser does not answer {method}"))??;
            bytes.pop();
            let said: Value = serde_json::from_slice(&bytes)?;
            if said["id"] == self.last {
                ensure!(said["error"].is_null(), "{method}: {}", said["error"]);
                return Ok(said["result"].clone());
            }
            if said["method"].is_string() {
                self.events.push(said);
            }
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// It does not end.
    pub async fn close(mut self) -> Result<()> {
        self.session.clear();
        let _ = timeout(
            Duration::from_secs(5),
            self.call("Browser.close", json!({})),
        )
        .await;
        let _ = timeout(Duration::from_secs(5), self.child.wait()).await;
        Ok(())
    }
}

fn of_base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for letter in text.bytes().filter(|letter| *letter != b'=') {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("no base64: {letter}"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Ok(bytes)
}
