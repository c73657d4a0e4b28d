//! Models on this machine: the store in the home directory, files, and the demo that comes with the
//! program. Names are resolved and files imported here, so that every command does it the same way.

use std::path::{Path, PathBuf};

use engine::{Vocab, WholeModel};
use gguf::Header;
use node::answer::Cancel;
use shard_registry::{
    AliasName, GgufFiles, ImportError, Imported, Progress, Resolved, Store, UnknownModel,
};
use swarm_proto::ModelId;

use crate::failure::Failure;
use crate::interrupt::end_if_set;
use crate::{figures, terminal, tokens};

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
    match (node::demo::meant(home, store, text), store.resolve(text)) {
        (Some(demo), _) => Ok(Resolved::Model(demo.ensure(home, store)?)),
        (None, Err(UnknownModel::Unknown { text, known })) => Err(unknown(&text, known).into()),
        (None, other) => Ok(other?),
    }
}

/// Says what is known instead; the demos always are.
pub fn unknown(text: &str, mut known: Vec<String>) -> Failure {
    known.extend(node::demo::names().map(str::to_owned));
    known.sort();
    known.dedup();
    let text = figures::printable(text, 80);
    Failure::new(format!(
        "no model or file here is called `{text}`; known are {}",
        known.join(", ")
    ))
    .try_this("`shoal models` lists them, `shoal import FILE.gguf` adds one")
}

/// Imports a file in place with a progress bar.
pub fn import(store: &Store, path: &Path, name: Option<&AliasName>) -> anyhow::Result<Imported> {
    with_bar("hashing", path, |progress| {
        store.import(path, name, progress)
    })
}

fn with_bar<T>(
    verb: &str,
    path: &Path,
    work: impl FnOnce(&mut dyn FnMut(Progress)) -> Result<T, ImportError>,
) -> anyhow::Result<T> {
    let what = path.file_name().unwrap_or_default().to_string_lossy();
    let bar = terminal::bar_of_bytes(0, &format!("{verb} {}", figures::printable(&what, 32)));
    let done = work(&mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    Ok(done?)
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

/// A whole model in a file, or several of which this is the first.
pub struct WholeFile {
    /// The file.
    pub path: PathBuf,
    /// What it was imported as, where a name or an id led to it.
    pub id: Option<ModelId>,
    /// It was put together from fetched shards, and goes when this does.
    made: Option<tempfile::TempPath>,
}

/// What is known of a model before it is loaded.
pub struct Description {
    /// Its tokenizer, where it has one.
    pub vocab: Option<Vocab>,
    /// The context it was trained on.
    pub n_ctx_train: u32,
    /// Decoded rows that may be fed again as one step.
    pub batch: u16,
}

impl WholeFile {
    /// Its path; one that was put together moves to `folder`, which outlives this.
    ///
    /// # Errors
    /// It cannot be moved there.
    pub fn into_path(self, folder: &Path) -> anyhow::Result<PathBuf> {
        let Some(made) = self.made else {
            return Ok(self.path);
        };
        let path = folder.join("model.gguf");
        std::fs::copy(&made, &path)?;
        Ok(path)
    }

    /// Reads the file's header.
    ///
    /// # Errors
    /// It is no GGUF, or its tokenizer is none.
    pub fn describe(&self) -> anyhow::Result<Description> {
        let header = header_of_file(&self.path)?;
        let arch = header.get_str("general.architecture")?;
        Ok(Description {
            vocab: tokens::vocab(&header)?,
            n_ctx_train: header.get_u32(&format!("{arch}.context_length"))?,
            batch: node::exact_batch(header.tensors.iter().map(|tensor| tensor.ty)),
        })
    }

    /// Hands the file to llama.cpp, with a wheel.
    ///
    /// # Errors
    /// It does not take it.
    pub fn load(&self, name: &str, n_ctx: u32, threads: Option<u32>) -> anyhow::Result<WholeModel> {
        let _wheel = terminal::wheel(format!("loading {name}"));
        let threads = threads.unwrap_or_else(|| threads_for(&self.path));
        Ok(WholeModel::load(&self.path, n_ctx, threads)?)
    }

    /// Reads and hashes all of it, with a bar: it is what was imported, or an error.
    pub fn verify(&self, cancel: &Cancel) -> anyhow::Result<()> {
        let Some(id) = self.id else {
            return Ok(());
        };
        let found = with_bar("checking", &self.path, |progress| {
            shard_registry::identify(&self.path, &mut |at| {
                end_if_set(cancel);
                progress(at);
            })
        })?;
        if found == id {
            return Ok(());
        }
        let path = self.path.display();
        let failure = Failure::new(format!(
            "{path} has changed since it was imported: it was model {}, it is {} now",
            id.short(),
            found.short()
        ));
        Err(failure
            .try_this(format!(
                "restore it, or take it as it is: `shoal import {path}`"
            ))
            .into())
    }
}

/// The file to hand to llama.cpp for the whole model.
pub fn whole_file(home: &Path, text: &str) -> anyhow::Result<WholeFile> {
    let store = store(home)?;
    let id = match resolve(home, &store, text)? {
        Resolved::File(path) => {
            let (id, made) = (None, None);
            return Ok(WholeFile { path, id, made });
        }
        Resolved::Model(id) => id,
    };
    let (models, _) = store.models();
    let files = models
        .into_iter()
        .find(|model| model.id == id)
        .map(|model| model.files)
        .unwrap_or_default();
    let here = store.here(id)?;
    if here.is_whole() && (files.is_empty() || missing(&files).next().is_some()) {
        return put_together(&store, id);
    }
    if let Some(gone) = missing(&files).next() {
        let failure = Failure::new(format!(
            "the weights of `{}` are not where they were: {} is gone",
            figures::printable(text, 80),
            gone.display()
        ));
        return Err(failure.try_this(BRING_BACK).into());
    }
    let path = files.into_iter().next().ok_or_else(|| {
        let asked = figures::printable(text, 80);
        let what = match here.layers.as_slice() {
            [] => "only its description is".to_owned(),
            some => format!("only layers {} are", figures::list(some)),
        };
        Failure::new(format!(
            "`{asked}` is not whole on this machine: {what} here"
        ))
        .try_this(format!(
            "`shoal pull {asked}`, `shoal import FILE.gguf`, or leave --local out to ask the swarm"
        ))
    })?;
    Ok(WholeFile {
        path,
        id: Some(id),
        made: None,
    })
}

/// A file of fetched shards, for as long as it is needed: llama.cpp loads whole models from files only.
fn put_together(store: &Store, id: ModelId) -> anyhow::Result<WholeFile> {
    let total = store.manifest(id)?.total_bytes();
    let bar = terminal::bar_of_bytes(total, "putting shards together");
    let mut file = tempfile::Builder::new()
        .suffix(".gguf")
        .tempfile_in(store.dir().join("tmp"))?;
    store.assemble(id, file.as_file_mut(), &mut |done| bar.set_position(done))?;
    bar.finish_and_clear();
    let made = file.into_temp_path();
    Ok(WholeFile {
        path: made.to_path_buf(),
        id: Some(id),
        made: Some(made),
    })
}

/// Of a model's files those that are not there any more.
pub fn missing(files: &[PathBuf]) -> impl Iterator<Item = &PathBuf> {
    files.iter().filter(|path| !path.is_file())
}

/// What to do about files that are gone.
pub const BRING_BACK: &str = "put the file back, or `shoal import` it where it is now";

/// Compute threads for a whole model in this process when nobody says.
fn threads_for(file: &Path) -> u32 {
    engine::threads_for(std::fs::metadata(file).map_or(0, |meta| meta.len()))
}
