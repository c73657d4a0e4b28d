//! Lines for a person: on a terminal a picture that is redrawn in place, else plain lines.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

/// How often a clock on the terminal goes on.
pub(crate) const TICK: Duration = Duration::from_millis(200);

/// Standard output and how many lines of it can be drawn over.
#[derive(Debug)]
pub struct Screen {
    live: bool,
    drawn: usize,
}

impl Screen {
    /// A screen on standard output; pictures only where it is a terminal that can move the cursor.
    pub fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Self {
            live: std::io::stdout().is_terminal() && !dumb,
            drawn: 0,
        }
    }

    /// Whether pictures are redrawn.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Columns of the terminal, or 80.
    pub fn width(&self) -> usize {
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
        size.map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns >= 40)
            .unwrap_or(80)
    }

    /// Writes lines that stay.
    pub fn lines(&mut self, text: &str) {
        self.drawn = 0;
        write(&format!("{text}\n"));
    }

    /// Writes lines to standard error.
    pub fn error(&mut self, text: &str) {
        self.drawn = 0;
        let _ = writeln!(anstream::stderr().lock(), "{text}");
    }

    /// Waits for `work`; a terminal shows meanwhile what for, and since when.
    pub async fn wait_for<T>(&mut self, what: &str, work: impl Future<Output = T>) -> T {
        self.drawn = 0;
        let begun = Instant::now();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    if self.drawn > 0 {
                        write(&erase(self.drawn));
                        self.drawn = 0;
                    }
                    return done;
                }
                _ = ticks.tick(), if self.live => {
                    let seconds = begun.elapsed().as_secs_f64();
                    self.picture(&[format!("  {what} · {seconds:.1} s")]);
                }
            }
        }
    }

    /// Draws over the last picture; without a terminal writes only the first line.
    pub fn picture(&mut self, lines: &[String]) {
        if !self.live {
            write(&format!("{}\n", lines.first().map_or("", String::as_str)));
            return;
        }
        write(&format!("{}{}\n", erase(self.drawn), lines.join("\n")));
        self.drawn = lines.len();
    }
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

/// The code that takes the last lines away.
fn erase(lines: usize) -> String {
    match lines {
        0 => String::new(),
        n => format!("\x1b[{n}A\r\x1b[J"),
    }
}

fn write(text: &str) {
    let mut out = anstream::stdout().lock();
    // A reader that went away (`run.sh | head`) is no reason to leave nodes behind: the run goes on to its end.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
