//! The demo model that comes with the program: written to `$home/demo.gguf` when first asked for,
//! and imported under the alias `demo`. Nothing is downloaded.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use shard_registry::{AliasName, ImportError, Store};
use swarm_proto::ModelId;

/// The alias, and what `--model` calls it.
pub const NAME: &str = "demo";

static BYTES: &[u8] = include_bytes!("../../models/demo.gguf");

/// Why the demo model is not usable.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The file could not be written.
    #[error("cannot write the demo model to {path}: {source}")]
    Write {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It could not be imported.
    #[error("demo model: {0}")]
    Import(#[from] ImportError),
}

/// Makes the demo model known in this home, unless it is already; returns its id.
///
/// # Errors
/// The home cannot be written.
pub fn ensure(home: &Path, store: &Store) -> Result<ModelId, DemoError> {
    let path = materialise(home).map_err(|(path, source)| DemoError::Write { path, source })?;
    if let Some(id) = store.find_file(&path) {
        return Ok(id);
    }
    let alias = NAME.parse::<AliasName>().ok();
    Ok(store.import(&path, alias.as_ref(), &mut |_| {})?.id)
}

/// Writes the file where it is missing, torn or of another version of the program.
fn materialise(home: &Path) -> Result<PathBuf, (PathBuf, io::Error)> {
    let path = home.join("demo.gguf");
    let at = |source| (path.clone(), source);
    let same_len = fs::metadata(&path).is_ok_and(|meta| meta.len() == BYTES.len() as u64);
    if same_len && fs::read(&path).is_ok_and(|bytes| blake3::hash(&bytes) == blake3::hash(BYTES)) {
        return Ok(path);
    }
    fs::create_dir_all(home).map_err(at)?;
    let mut temp = tempfile::NamedTempFile::new_in(home).map_err(at)?;
    temp.write_all(BYTES).map_err(at)?;
    temp.as_file().sync_all().map_err(at)?;
    temp.persist(&path).map_err(|e| at(e.error))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_made_again_when_torn() {
        let home = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&home.path().join("store")).expect("store");
        let id = ensure(home.path(), &store).expect("made");
        assert_eq!(ensure(home.path(), &store).expect("found"), id);
        assert_eq!(store.alias(&NAME.parse().expect("an alias")), Some(id));
        fs::write(home.path().join("demo.gguf"), b"torn").expect("write");
        assert_eq!(ensure(home.path(), &store).expect("made again"), id);
    }
}
