//! Models on this machine: the store in the home directory, files, and the demo that comes with the
//! program. Names are resolved and files imported here, so that every command does it the same way.

use std::path::{Path, PathBuf};

use gguf::Header;
use shard_registry::{AliasName, GgufFiles, Imported, Resolved, Store, UnknownModel};
use swarm_proto::ModelId;

use crate::failure::Failure;
use crate::{figures, terminal};

/// The name of the model that comes with the program.
pub const DEMO: &str = "demo";

/// The store of a home directory; made when it is not there.
pub fn store(home: &Path) -> anyhow::Result<Store> {
    Ok(Store::open(&home.join("store"))?)
}

/// A model by name, beginning of its id, or file; a file is imported in place first.
pub fn find(home: &Path, text: &str) -> anyhow::Result<ModelId> {
    let store = store(home)?;
    match resolve(home, &store, text)? {
        Resolved::Model(id) => Ok(id),
        Resolved::File(path) => match store.find_file(&path) {
            Some(id) => Ok(id),
            None => Ok(import(&store, &path, None)?.id),
        },
    }
}

/// As the store resolves it, with the demo made when it is asked for.
pub fn resolve(home: &Path, store: &Store, text: &str) -> anyhow::Result<Resolved> {
    match store.resolve(text) {
        Err(UnknownModel::Unknown { .. }) if text == DEMO => {
            Ok(Resolved::Model(node::demo::ensure(home, store)?))
        }
        Err(UnknownModel::Unknown { text, known }) => Err(unknown(&text, known).into()),
        other => Ok(other?),
    }
}

/// Says what is known instead; the demo always is.
pub fn unknown(text: &str, mut known: Vec<String>) -> Failure {
    if !known.iter().any(|name| name == DEMO) {
        known.push(DEMO.into());
    }
    known.sort();
    let text = figures::printable(text, 80);
    Failure::new(format!(
        "no model or file here is called `{text}`; known are {}",
        known.join(", ")
    ))
    .try_this("`shoal models` lists them, `shoal import FILE.gguf` adds one")
}

/// Imports a file in place with a progress bar.
pub fn import(store: &Store, path: &Path, name: Option<&AliasName>) -> anyhow::Result<Imported> {
    let what = path.file_name().unwrap_or_default().to_string_lossy();
    let bar = terminal::bar_of_bytes(0, &format!("hashing {}", figures::printable(&what, 32)));
    let imported = store.import(path, name, &mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    Ok(imported?)
}

/// The header of a model in one file or several, without importing it.
pub fn header_of_file(path: &Path) -> anyhow::Result<Header> {
    let files = GgufFiles::open(path)?;
    Ok(Header {
        alignment: gguf::ALIGNMENT_DEFAULT,
        kv: files.kv,
        tensors: files.tensors,
        data_offset: 0,
    })
}

/// The file to hand to llama.cpp for the whole model: the first of its files.
pub fn first_file(home: &Path, text: &str) -> anyhow::Result<PathBuf> {
    let store = store(home)?;
    let id = match resolve(home, &store, text)? {
        Resolved::File(path) => return Ok(path),
        Resolved::Model(id) => id,
    };
    let (models, _) = store.models();
    let files = models
        .into_iter()
        .find(|model| model.id == id)
        .map(|model| model.files)
        .unwrap_or_default();
    files.into_iter().next().ok_or_else(|| {
        Failure::new(format!(
            "only the description of `{}` is here, not its weights",
            figures::printable(text, 80)
        ))
        .try_this("`shoal import FILE.gguf`, or leave --local out to ask the swarm")
        .into()
    })
}

/// Compute threads for a whole model in this process when nobody says.
pub fn threads_for(file: &Path) -> u32 {
    engine::threads_for(std::fs::metadata(file).map_or(0, |meta| meta.len()))
}
