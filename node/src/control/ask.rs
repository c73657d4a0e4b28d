//! Asking a running node, from another process of its owner. Blocks.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{ANSWER_BYTES_MAX, Answer, NodeStatus, Request, SOCKET};

/// How long a node may take for each step of an answer: it has its disk to look at.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a node did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no node runs with the home directory {home}")]
    NoNode {
        /// The directory.
        home: PathBuf,
    },
    /// Somebody listens, and that is all.
    #[error("the node of the home directory {home} does not answer: {source}")]
    Io {
        /// The directory.
        home: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It refuses.
    #[error("the node refuses: {0}")]
    Refused(String),
}

/// Asks the node of a home directory; its status after what was asked for.
///
/// # Errors
/// See [`AskError`].
pub fn ask(home: &Path, request: &Request) -> Result<NodeStatus, AskError> {
    let failed = |source: io::Error| AskError::Io {
        home: home.to_owned(),
        source,
    };
    let stream = match UnixStream::connect(home.join(SOCKET)) {
        Ok(stream) => stream,
        // Nothing there, or what a killed node left.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            let home = home.to_owned();
            return Err(AskError::NoNode { home });
        }
        Err(error) => return Err(failed(error)),
    };
    match exchange(stream, request).map_err(failed)? {
        Answer::Status(status) => Ok(*status),
        Answer::Refused(why) => Err(AskError::Refused(why)),
    }
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<Answer> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    let mut reader = BufReader::new(stream.take(ANSWER_BYTES_MAX));
    reader.read_until(b'\n', &mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
