//! The demo model that comes with the program: written to `$home/demo.gguf` when first asked for,
//! and imported under the alias `demo`. Nothing is downloaded.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use shard_registry::{AliasName, ImportError, Resolved, Store};
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

/// Whether `text` means the model that comes with the program: it is called so, and the user has given
/// the name to no other.
pub fn is_meant(home: &Path, store: &Store, text: &str) -> bool {
    if text != NAME {
        return false;
    }
    match store.resolve(text) {
        Err(_) => true,
        Ok(Resolved::File(_)) => false,
        Ok(Resolved::Model(id)) => {
            let (models, _) = store.models();
            let ours = path(home);
            let ours = ours.canonicalize().unwrap_or(ours);
            models
                .iter()
                .any(|model| model.id == id && model.files == [ours.as_path()])
        }
    }
}

/// Makes the demo model of this version known in this home, unless it is already; returns its id.
///
/// # Errors
/// The home cannot be written.
pub fn ensure(home: &Path, store: &Store) -> Result<ModelId, DemoError> {
    let path = materialise(home).map_err(|(path, source)| DemoError::Write { path, source })?;
    let alias = NAME.parse::<AliasName>().ok();
    if let Some(id) = store.find_file(&path)
        && alias.as_ref().and_then(|alias| store.alias(alias)) == Some(id)
    {
        return Ok(id);
    }
    Ok(store.import(&path, alias.as_ref(), &mut |_| {})?.id)
}

fn path(home: &Path) -> PathBuf {
    home.join("demo.gguf")
}

/// Writes the file where it is missing, torn or of another version of the program.
fn materialise(home: &Path) -> Result<PathBuf, (PathBuf, io::Error)> {
    let path = path(home);
    let at = |source| (path.clone(), source);
    let same_len = fs::metadata(&path).is_ok_and(|meta| meta.len() == BYTES.len() as u64);
    if same_len && fs::read(&path).is_ok_and(|bytes| bytes == BYTES) {
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

    #[test]
    fn an_older_one_is_replaced_and_the_users_own_is_not() {
        let home = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&home.path().join("store")).expect("store");
        let alias = NAME.parse().expect("an alias");
        let older = another(&path(home.path()));
        let older = store
            .import(&older, Some(&alias), &mut |_| {})
            .expect("it")
            .id;
        assert!(is_meant(home.path(), &store, NAME));
        let id = ensure(home.path(), &store).expect("made");
        assert_ne!(id, older);
        assert_eq!(store.alias(&alias), Some(id));
        assert!(is_meant(home.path(), &store, NAME));

        let own = another(&home.path().join("own.gguf"));
        let own = store
            .import(&own, Some(&alias), &mut |_| {})
            .expect("it")
            .id;
        assert_eq!(own, older);
        assert!(!is_meant(home.path(), &store, NAME));
        assert!(!is_meant(home.path(), &store, "other"));
    }

    /// A model that differs from the demo in its last weight.
    fn another(path: &Path) -> PathBuf {
        let mut bytes = BYTES.to_vec();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        fs::write(path, bytes).expect("write");
        path.to_owned()
    }
}
