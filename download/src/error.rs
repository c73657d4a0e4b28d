//! Why a file cannot be had, and what to try.

use std::{io, path::PathBuf};

/// Why a file cannot be had. No message holds a token, nor what stands behind the `?` of an address.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is {text:?}, which is no address of a hub")]
    Endpoint {
        /// What it is.
        text: String,
    },
    /// Neither TLS nor this machine.
    #[error(
        "{url}: only https is used beyond this machine, anybody on the way could change or read it"
    )]
    Insecure {
        /// The address.
        url: String,
    },
    /// No authority's certificate is known here, so nobody's can be checked.
    #[error("no certificates of authorities are known on this machine: {why}")]
    NoRoots {
        /// What was looked for.
        why: String,
    },
    /// No connection, or one that broke.
    #[error("{host} cannot be reached: {why}")]
    Unreachable {
        /// Who.
        host: String,
        /// What went wrong.
        why: String,
    },
    /// Its certificate is of nobody known here, of another host, or too old.
    #[error("{host} cannot prove who it is: {why}")]
    Certificate {
        /// Who.
        host: String,
        /// What is wrong with it.
        why: String,
    },
    /// A server said no in a way that has no words of its own here.
    #[error("{url}: the server says {status}")]
    Status {
        /// The address.
        url: String,
        /// As HTTP counts.
        status: u16,
    },
    /// A server broke the rules.
    #[error("{url}: {why}")]
    Server {
        /// The address.
        url: String,
        /// How.
        why: String,
    },
    /// The licence has to be accepted first.
    #[error("{repo} is gated: the hub gives it only to those who accepted its licence")]
    Gated {
        /// The repository.
        repo: String,
        /// Where to accept it.
        page: String,
        /// Whether a token was sent.
        token_sent: bool,
    },
    /// The hub does not say whether it is there.
    #[error("{repo}: the hub knows no such repository, or does not show it{}", if *.token_sent { " to the owner of this token" } else { " without a token" })]
    NoRepo {
        /// The repository.
        repo: String,
        /// Whether a token was sent.
        token_sent: bool,
    },
    /// No such branch, tag or commit.
    #[error("{repo} has no revision {revision:?}")]
    NoRevision {
        /// The repository.
        repo: String,
        /// What was asked for.
        revision: String,
    },
    /// No such file, or none that fits.
    #[error("{repo}@{revision} has no {wanted}{}", list(.models, "; its models are "))]
    NoFile {
        /// The repository.
        repo: String,
        /// Of it.
        revision: String,
        /// What was asked for.
        wanted: String,
        /// What it has.
        models: Vec<String>,
    },
    /// Several files fit.
    #[error("{repo}@{revision} has several models that fit{}", list(.models, ": "))]
    Ambiguous {
        /// The repository.
        repo: String,
        /// Of it.
        revision: String,
        /// Those that fit.
        models: Vec<String>,
    },
    /// Nothing may be asked for, and it is not here.
    #[error("{what} is not in the cache, and HF_HUB_OFFLINE forbids to ask for it")]
    Offline {
        /// What was wanted.
        what: String,
    },
    /// Another program is at it.
    #[error("another program is downloading {path}")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// It would not fit.
    #[error("{need} more bytes are needed in {path}, {free} are free")]
    NoRoom {
        /// Where.
        path: PathBuf,
        /// Bytes still to come.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The connection broke too often.
    #[error("the connection broke {times} times in a row, {done} of {total} bytes are here: {why}")]
    Cut {
        /// How often without a byte in between.
        times: u32,
        /// What arrived, and stays.
        done: u64,
        /// What there is.
        total: u64,
        /// The last break.
        why: String,
    },
    /// All bytes came, and they are others.
    #[error(
        "{url}: what came has the SHA-256 {found}, announced was {announced}; it was thrown away"
    )]
    Hash {
        /// The address.
        url: String,
        /// As the server said.
        announced: String,
        /// As they are.
        found: String,
    },
    /// The disk.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl DownloadError {
    /// What the user can do about it.
    pub fn remedy(&self) -> Option<String> {
        let again = "the same command again: it goes on where it stopped";
        let token = "set HF_TOKEN, or write it where `hf auth login` does";
        Some(match self {
            Self::Insecure { .. } => "an https address".into(),
            Self::NoRoots { .. } => {
                "install ca-certificates, or name a file in SSL_CERT_FILE".into()
            }
            Self::Certificate { .. } => {
                "if this network has an authority of its own, name the file with its certificate in SSL_CERT_FILE \
                 (with all others that are needed: the system's are not read then)"
                    .into()
            }
            Self::Unreachable { .. } => {
                "see that this machine is online (HTTPS_PROXY, where it needs a proxy)".into()
            }
            Self::Status {
                status: 401 | 403, ..
            } => "see that the address may be read by anybody".into(),
            Self::Gated {
                page, token_sent, ..
            } => {
                let then = if *token_sent {
                    "with the account of your token"
                } else {
                    token
                };
                format!("accept the licence at {page}, then {then}")
            }
            Self::NoRepo {
                token_sent: false, ..
            } => format!("see how it is written; if it is private, {token}"),
            Self::NoRepo { .. } => "see how it is written, and that the token may read it".into(),
            Self::NoFile { repo, models, .. } | Self::Ambiguous { repo, models, .. } => {
                format!("hf:{repo}/{}", models.first()?)
            }
            Self::Offline { .. } => {
                "unset HF_HUB_OFFLINE, or download it on a machine that is online".into()
            }
            Self::Busy { .. } => "again when that is done".into(),
            Self::NoRoom { .. } => {
                "another disk: HF_HUB_CACHE says where the hub's files go, SHOAL_HOME the rest"
                    .into()
            }
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                format!("make room on that disk, then {again}")
            }
            Self::Cut { .. } => again.into(),
            Self::Hash { .. } => {
                "the same command again; if it stays so, the file on the server is damaged".into()
            }
            _ => return None,
        })
    }

    /// Whether it may be different in a moment.
    pub(crate) fn passes(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// Names in a message: a few are enough.
fn list(names: &[String], before: &str) -> String {
    const SHOWN: usize = 12;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let more = match names.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    match shown[..] {
        [] => String::new(),
        _ => format!("{before}{}{more}", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_that_what_arrived_stays() {
        let full = DownloadError::Io {
            path: "blob.incomplete".into(),
            source: io::ErrorKind::StorageFull.into(),
        };
        let remedy = full.remedy().unwrap();
        assert!(
            remedy.contains("make room") && remedy.contains("goes on where it stopped"),
            "{remedy}"
        );
        assert!(!full.passes(), "a full disk is no broken connection");
    }
}
