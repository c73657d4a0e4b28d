//! Who this node is: a persistent ed25519 key, and the conversions between our `Peer` (the 32 public
//! bytes) and libp2p's `PeerId`. Does not decide whom to trust: that is `net::Access`.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use libp2p::{
    PeerId,
    identity::{self, Keypair, ed25519},
};
use swarm_proto::Peer;

/// The file in the home folder that holds the secret key: 32 raw bytes, mode 0600.
pub const KEY_FILE: &str = "identity.key";

/// A secret key and the peer it makes us.
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
    secret: [u8; 32],
    peer: Peer,
}

/// Why the identity could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or written.
    #[error("identity key {path}: {source}")]
    Io {
        /// The key file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a key.
    #[error("identity key {path}: {len} bytes, expected 32; move it away to get a new identity")]
    Length {
        /// The key file.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Others may read the secret.
    #[error("identity key {path} is readable by others (mode {mode:o}); run: chmod 600 {path}")]
    Mode {
        /// The key file.
        path: PathBuf,
        /// Its mode bits.
        mode: u32,
    },
}

impl Identity {
    /// A new identity that is kept nowhere: for clients and tests.
    pub fn generate() -> Self {
        Self::from_ed25519(ed25519::Keypair::generate())
    }

    /// The identity of these secret bytes, or `None` where they are no key.
    pub fn from_secret(mut secret: [u8; 32]) -> Option<Self> {
        let key = ed25519::SecretKey::try_from_bytes(&mut secret).ok()?;
        Some(Self::from_ed25519(ed25519::Keypair::from(key)))
    }

    /// Reads `$home/identity.key`, or makes it where there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written, has another length, or is readable by others.
    pub fn load_or_create(home: &Path) -> Result<Self, IdentityError> {
        let path = home.join(KEY_FILE);
        match Self::load(&path) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Self::create(home, &path)
            }
            other => other,
        }
    }

    /// Reads a key file: 32 raw bytes that only their owner may read.
    ///
    /// # Errors
    /// As [`Identity::load_or_create`], and where there is none.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let io = |source| IdentityError::Io {
            path: path.to_owned(),
            source,
        };
        let file = fs::File::open(path).map_err(io)?;
        if let Some(mode) = open_to_others(&file.metadata().map_err(io)?) {
            return Err(IdentityError::Mode {
                path: path.to_owned(),
                mode,
            });
        }
        let mut bytes = Vec::with_capacity(33);
        // One byte more than a key, so that a longer file is noticed and not read.
        file.take(33).read_to_end(&mut bytes).map_err(io)?;
        let wrong = || IdentityError::Length {
            path: path.to_owned(),
            len: bytes.len(),
        };
        let secret: [u8; 32] = bytes.as_slice().try_into().map_err(|_| wrong())?;
        Self::from_secret(secret).ok_or_else(wrong)
    }

    /// Written under another name and linked into place: two processes that start at once in one
    /// home end with one key, and a crash leaves no half key.
    fn create(home: &Path, path: &Path) -> Result<Self, IdentityError> {
        let io = |source| IdentityError::Io {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(home).map_err(io)?;
        let made = Self::generate();
        let temp = home.join(format!(".{KEY_FILE}.{}", made.peer));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temp)
            .map_err(io)?;
        file.write_all(&made.secret).map_err(io)?;
        file.sync_all().map_err(io)?;
        let linked = fs::hard_link(&temp, path);
        fs::remove_file(&temp).map_err(io)?;
        match linked {
            Ok(()) => Ok(made),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(source) => Err(io(source)),
        }
    }

    fn from_ed25519(key: ed25519::Keypair) -> Self {
        let mut secret = [0; 32];
        secret.copy_from_slice(key.secret().as_ref());
        let peer = Peer(key.public().to_bytes());
        Self {
            keypair: Keypair::from(key),
            secret,
            peer,
        }
    }

    /// The public half: what others know us by.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The secret half, for signing adverts. Not to be written anywhere else.
    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    pub(crate) fn keypair(&self) -> &Keypair {
        &self.keypair
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.peer).finish()
    }
}

/// The mode bits of a secret's file where others than its owner may read or write it.
pub(crate) fn open_to_others(meta: &fs::Metadata) -> Option<u32> {
    let mode = meta.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

/// libp2p's name of a peer, or `None` where the bytes are not a point of the curve.
pub(crate) fn peer_id(peer: &Peer) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&peer.0).ok()?;
    Some(identity::PublicKey::from(key).to_peer_id())
}

/// Our name of a libp2p peer, or `None` where its key is not an ed25519 key inlined in the id.
pub(crate) fn peer_of(id: &PeerId) -> Option<Peer> {
    const PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];
    let bytes = id.to_bytes();
    let key: [u8; 32] = bytes.strip_prefix(&PREFIX)?.try_into().ok()?;
    Some(Peer(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_and_peer_id_convert_both_ways_and_print_alike() {
        let me = Identity::generate();
        let id = peer_id(&me.peer()).expect("own key");
        assert_eq!(peer_of(&id), Some(me.peer()));
        assert_eq!(id, me.keypair().public().to_peer_id());
        assert_eq!(id.to_string(), me.peer().to_string());
    }

    #[test]
    fn the_key_survives_a_restart_and_is_private() {
        let home = tempfile::tempdir().expect("temp dir");
        let first = Identity::load_or_create(home.path()).expect("created");
        let second = Identity::load_or_create(home.path()).expect("loaded");
        assert_eq!(first.peer(), second.peer());
        let mode = fs::metadata(home.path().join(KEY_FILE))
            .expect("metadata")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(home.path()).expect("dir").count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn a_key_of_another_length_or_open_to_others_is_refused() {
        let home = tempfile::tempdir().expect("temp dir");
        let path = home.path().join(KEY_FILE);
        fs::write(&path, [7u8; 40]).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        let long = Identity::load_or_create(home.path());
        assert!(
            matches!(long, Err(IdentityError::Length { len: 33, .. })),
            "{long:?}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        let open = Identity::load_or_create(home.path());
        assert!(matches!(open, Err(IdentityError::Mode { .. })), "{open:?}");
    }
}
