//! How a command ends: the exit code, and an error that names its cause and the next thing to try.
//!
//! ```text
//! error: no peer holds layers 8..12 of demo
//!   try: start a node with `shoal-node --model demo --layers 8..12`
//! ```

use std::io::Write;
use std::process::ExitCode;

use crate::terminal::{BAD, HINT, paint};

/// Codes of the process: 0 is success, 2 also what clap uses for arguments it refuses.
const FAILURE: u8 = 1;
const USAGE: u8 = 2;
/// 128 + SIGINT, as shells report it.
pub const INTERRUPTED: u8 = 130;

/// An end that is not success and has something to say to the user.
#[derive(Debug)]
pub struct Failure {
    cause: String,
    remedy: Option<String>,
    code: u8,
    quiet: bool,
    told_in_json: bool,
}

impl Failure {
    /// Something went wrong; no remedy beyond what the cause says.
    pub fn new(cause: impl Into<String>) -> Self {
        Self {
            cause: cause.into(),
            remedy: None,
            code: FAILURE,
            quiet: false,
            told_in_json: false,
        }
    }

    /// The arguments do not fit together.
    pub fn usage(cause: impl Into<String>) -> Self {
        Self {
            code: USAGE,
            ..Self::new(cause)
        }
    }

    /// Ctrl-C: what was open is closed, nothing more to say.
    pub fn interrupted() -> Self {
        Self {
            code: INTERRUPTED,
            quiet: true,
            ..Self::new("interrupted")
        }
    }

    /// Writing to stdout failed. A reader that left (`shoal models | head -1`) has seen enough: that is
    /// no failure at all.
    pub fn stdout(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self {
                code: 0,
                quiet: true,
                ..Self::new("nobody reads the output any more")
            }
        } else {
            Self::new(format!("writing the output: {error}"))
        }
    }

    /// Whether the user has already left or said so: nothing to print.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// What `--json` printed says it already: that stays the only object.
    pub fn told_in_json(mut self) -> Self {
        self.told_in_json = true;
        self
    }

    /// Adds the next thing to try.
    pub fn try_this(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.cause)
    }
}

impl std::error::Error for Failure {}

/// What `--json` prints of a failure.
#[derive(serde::Serialize)]
struct Report<'a> {
    error: ErrorReport<'a>,
}

#[derive(serde::Serialize)]
struct ErrorReport<'a> {
    message: &'a str,
    #[serde(rename = "try", skip_serializing_if = "Option::is_none")]
    remedy: Option<&'a str>,
    exit_code: u8,
}

/// Says how the command ended, to people and with `json` to programs too, and gives the code for it.
pub fn report(result: anyhow::Result<()>, json: bool) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let failure = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Failure>());
    let code = failure.map_or(FAILURE, |failure| failure.code);
    if failure.is_some_and(Failure::is_quiet) {
        return ExitCode::from(code);
    }
    let message = one_line(&error);
    let remedy = failure.and_then(|failure| failure.remedy.as_deref());
    let mut err = anstream::stderr();
    let _ = writeln!(err, "{} {message}", paint(BAD, "error:"));
    if let Some(remedy) = remedy {
        let _ = writeln!(err, "  {} {remedy}", paint(HINT, "try:"));
    }
    if json && !failure.is_some_and(|failure| failure.told_in_json) {
        let error = ErrorReport {
            message: &message,
            remedy,
            exit_code: code,
        };
        // Whoever does not read it has the exit code.
        let _ = crate::terminal::say_json_line(&Report { error });
    }
    ExitCode::from(code)
}

/// The chain of causes in one line. A cause that its parent already quotes is not repeated, and what a
/// file or a peer put into a message cannot move the cursor.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !line.contains(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    crate::figures::printable(&line.replace('\n', " "), 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_one_line_without_echoes() {
        let error = anyhow::anyhow!("the end\nof file")
            .context("reading x: the end\nof file")
            .context("import");
        assert_eq!(one_line(&error), "import: reading x: the end of file");
    }

    #[test]
    fn a_reader_that_left_is_not_an_error() {
        let left = Failure::stdout(std::io::ErrorKind::BrokenPipe.into());
        assert!(left.is_quiet());
        assert_eq!(left.code, 0);
        let full = Failure::stdout(std::io::ErrorKind::StorageFull.into());
        assert!(!full.is_quiet());
        assert_eq!(full.code, FAILURE);
    }
}
