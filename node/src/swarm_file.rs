//! One small file of a home for each swarm: a list of peers with what is known of them. What cannot be
//! read is as good as nothing.
//!
//! ```text
//! $home/<folder>/<swarm>.json   {"version": 1, "peers": [ … ]}
//! ```

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use swarm_proto::SwarmId;

/// What this version writes; a file of another is left alone until it is written anew.
const VERSION: u32 = 1;
/// Swarms remembered, those visited last: short-lived ones (tests) should not pile up.
pub(crate) const SWARMS_MAX: usize = 32;

#[derive(Serialize, Deserialize)]
struct Record<T> {
    version: u32,
    peers: Vec<T>,
}

/// Where such a list lies, and how long it may be.
#[derive(Debug, Clone)]
pub(crate) struct SwarmFile {
    path: PathBuf,
    bytes_max: u64,
}

impl SwarmFile {
    /// That of `swarm` in a folder of the home; nothing is read yet.
    pub(crate) fn new(home: &Path, folder: &str, swarm: &SwarmId, bytes_max: u64) -> Self {
        Self {
            path: home.join(folder).join(format!("{swarm}.json")),
            bytes_max,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn read<T: DeserializeOwned>(&self) -> Vec<T> {
        let mut text = String::new();
        let file = fs::File::open(&self.path);
        let read = file.and_then(|file| file.take(self.bytes_max).read_to_string(&mut text));
        match read.map(|_| serde_json::from_str::<Record<T>>(&text)) {
            Ok(Ok(record)) if record.version == VERSION => record.peers,
            _ => Vec::new(),
        }
    }

    /// Writes the list in place of the old one, and forgets the swarms that were visited longest ago.
    ///
    /// # Errors
    /// The home cannot be written.
    pub(crate) fn write<T: Serialize>(&self, peers: Vec<T>) -> io::Result<()> {
        let version = VERSION;
        let text = serde_json::to_string_pretty(&Record { version, peers })?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let temp = tempfile::NamedTempFile::new_in(folder)?;
        fs::write(temp.path(), text)?;
        // Not synced: after a power cut an empty file is one without peers.
        temp.persist(&self.path)?;
        forget_oldest(folder, &self.path)
    }
}

/// Leaves `newest` and the newest of the others.
fn forget_oldest(folder: &Path, newest: &Path) -> io::Result<()> {
    let mut others = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path() != newest {
            others.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    others.sort();
    let surplus = (others.len() + 1).saturating_sub(SWARMS_MAX);
    for (_, path) in others.into_iter().take(surplus) {
        fs::remove_file(path)?;
    }
    Ok(())
}
