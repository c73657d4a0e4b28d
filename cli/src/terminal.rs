//! The one place that knows the terminal: colours, notes, progress. Answers go to stdout, everything
//! said about them to stderr; neither carries an escape code when it is not a terminal, and `NO_COLOR`
//! is obeyed (anstream decides both).

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;

/// Side remarks.
pub const DIM: Style = Style::new().dimmed();
/// Headings and names.
pub const BOLD: Style = Style::new().bold();
/// Served, passed, fine.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Worth a look.
pub const WARN: Style = AnsiColor::Yellow.on_default();
/// Broken or missing.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// What to type next.
pub const HINT: Style = AnsiColor::Cyan.on_default();

/// Colours of `--help`.
pub fn help_styles() -> clap::builder::Styles {
    clap::builder::Styles::styled()
        .header(BOLD)
        .usage(BOLD)
        .literal(HINT)
        .placeholder(DIM)
        .error(BAD)
        .valid(GOOD)
        .invalid(WARN)
}

/// Text in a style; anstream takes the codes out where they do not belong.
pub fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// A dim line on stderr. A closed stderr is nobody's error.
pub fn note(text: impl std::fmt::Display) {
    let _ = writeln!(anstream::stderr(), "{}", paint(DIM, text));
}

/// A line on stderr with styles of its own.
pub fn note_styled(text: impl std::fmt::Display) {
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// A line on stderr that should not be overlooked.
pub fn warn(text: impl std::fmt::Display) {
    let _ = writeln!(anstream::stderr(), "{} {text}", paint(WARN, "warning:"));
}

/// One line on stdout.
pub fn say(text: impl std::fmt::Display) -> Result<(), Failure> {
    writeln!(anstream::stdout(), "{text}").map_err(Failure::stdout)
}

/// A piece of an answer on stdout, at once.
pub fn stream(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Failure::stdout)
}

/// A value as indented JSON on stdout.
pub fn say_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout(), "{text}").map_err(Failure::stdout)?;
    Ok(())
}

/// A value as one line of JSON on stdout, at once.
pub fn say_json_line(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string(value)?;
    Ok(stream(&format!("{text}\n"))?)
}

/// Columns of the terminal on stdout; 80 where there is none.
pub fn width() -> usize {
    terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0))
}

/// Whether someone is typing.
pub fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Whether someone reads the side remarks.
pub fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// A bar over a known number of bytes, on stderr; invisible when that is not a terminal.
pub fn bar_of_bytes(total: u64, what: &str) -> ProgressBar {
    bar(
        total,
        what,
        "{msg:<24} {bar:28} {bytes:>10} of {total_bytes}  {bytes_per_sec}  {eta}",
    )
}

/// A bar over a known number of things, on stderr; invisible when that is not a terminal.
pub fn bar_of(total: u64, what: &str) -> ProgressBar {
    bar(total, what, "{msg:<24} {bar:28} {pos:>5} of {len}  {eta}")
}

fn bar(total: u64, what: &str, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.set_message(what.to_string());
    bar
}

/// A wheel for a wait of unknown length, on stderr; invisible when that is not a terminal.
pub fn wheel(what: impl Into<String>) -> Wheel {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.set_message(what.into());
    bar.enable_steady_tick(Duration::from_millis(120));
    Wheel(bar)
}

/// A [`wheel`] that is wiped when it goes out of scope, on every path.
pub struct Wheel(ProgressBar);

impl Wheel {
    /// A dim line above the wheel.
    pub fn note(&self, text: impl std::fmt::Display) {
        self.0.suspend(|| note(text));
    }
}

impl Drop for Wheel {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
