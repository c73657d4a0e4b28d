//! The demo models that come with the program: written to `$home/demo.gguf` or `demo-moe.gguf` when first asked for,
//! and imported under the alias `demo` or `demo-moe`. Nothing is downloaded.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use shard_registry::{AliasName, ImportError, Resolved, Store};
use swarm_proto::ModelId;

/// The alias of the first, and what `--model` calls it.
pub const NAME: &str = "demo";

/// A model that comes with the program.
#[derive(Debug)]
pub struct Demo {
    name: &'static str,
    bytes: &'static [u8],
}

static DEMOS: [Demo; 2] = [
    Demo {
        name: NAME,
        bytes: include_bytes!("../../models/demo.gguf"),
    },
    // A mixture of experts.
    Demo {
        name: "demo-moe",
        bytes: include_bytes!("../../models/demo-moe.gguf"),
    },
];

/// What they are called.
pub fn names() -> impl Iterator<Item = &'static str> {
    DEMOS.iter().map(|demo| demo.name)
}

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

/// The model that comes with the program and that `text` means: it is called so, and the user has given the name to no
/// other.
pub fn meant(home: &Path, store: &Store, text: &str) -> Option<&'static Demo> {
    let demo = DEMOS.iter().find(|demo| demo.name == text)?;
    let ours = match store.resolve(text) {
        Err(_) => true,
        Ok(Resolved::File(_)) => false,
        Ok(Resolved::Model(id)) => {
            let (models, _) = store.models();
            let ours = demo.path(home);
            let ours = ours.canonicalize().unwrap_or(ours);
            models
                .iter()
                .any(|model| model.id == id && model.files == [ours.as_path()])
        }
    };
    ours.then_some(demo)
}

impl Demo {
    /// Makes the model of this version known in this home, unless it is already; returns its id.
    ///
    /// # Errors
    /// The home cannot be written.
    pub fn ensure(&self, home: &Path, store: &Store) -> Result<ModelId, DemoError> {
        let path = self
            .materialise(home)
            .map_err(|(path, source)| DemoError::Write { path, source })?;
        let alias = self.name.parse::<AliasName>().ok();
        if let Some(id) = store.find_file(&path)
            && alias.as_ref().and_then(|alias| store.alias(alias)) == Some(id)
        {
            return Ok(id);
        }
        Ok(store.import(&path, alias.as_ref(), &mut |_| {})?.id)
    }

    fn path(&self, home: &Path) -> PathBuf {
        home.join(format!("{}.gguf", self.name))
    }

    /// Writes the file where it is missing, torn or of another version of the program.
    fn materialise(&self, home: &Path) -> Result<PathBuf, (PathBuf, io::Error)> {
        let path = self.path(home);
        let at = |source| (path.clone(), source);
        let same_len = fs::metadata(&path).is_ok_and(|meta| meta.len() == self.bytes.len() as u64);
        if same_len && fs::read(&path).is_ok_and(|bytes| bytes == self.bytes) {
            return Ok(path);
        }
        fs::create_dir_all(home).map_err(at)?;
        let mut temp = tempfile::NamedTempFile::new_in(home).map_err(at)?;
        temp.write_all(self.bytes).map_err(at)?;
        temp.as_file().sync_all().map_err(at)?;
        temp.persist(&path).map_err(|e| at(e.error))?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_made_again_when_torn() {
        let home = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&home.path().join("store")).expect("store");
        for demo in &DEMOS {
            let ensure = || demo.ensure(home.path(), &store).expect("made");
            let id = ensure();
            assert_eq!(ensure(), id);
            assert_eq!(store.alias(&demo.name.parse().expect("an alias")), Some(id));
            fs::write(demo.path(home.path()), b"torn").expect("write");
            assert_eq!(ensure(), id);
        }
    }

    #[test]
    fn an_older_one_is_replaced_and_the_users_own_is_not() {
        let home = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&home.path().join("store")).expect("store");
        let alias = NAME.parse().expect("an alias");
        let older = another(&DEMOS[0].path(home.path()));
        let older = store
            .import(&older, Some(&alias), &mut |_| {})
            .expect("it")
            .id;
        assert!(meant(home.path(), &store, NAME).is_some());
        let id = DEMOS[0].ensure(home.path(), &store).expect("made");
        assert_ne!(id, older);
        assert_eq!(store.alias(&alias), Some(id));
        assert!(meant(home.path(), &store, NAME).is_some());

        let own = another(&home.path().join("own.gguf"));
        let own = store
            .import(&own, Some(&alias), &mut |_| {})
            .expect("it")
            .id;
        assert_eq!(own, older);
        assert!(meant(home.path(), &store, NAME).is_none());
        assert!(meant(home.path(), &store, "other").is_none());
    }

    /// A model that differs from the demo in its last weight.
    fn another(path: &Path) -> PathBuf {
        let mut bytes = DEMOS[0].bytes.to_vec();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        fs::write(path, bytes).expect("write");
        path.to_owned()
    }
}
