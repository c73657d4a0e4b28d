//! A whole GGUF out of verified shards, for a program that takes nothing else.

use std::{
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
};

use gguf::{Header, TensorInfo};
use swarm_proto::ModelId;

use crate::{
    manifest::ManifestError,
    reader::ReadError,
    store::{Store, StoreError},
};

/// Why a model was not written.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// The store has not all of it, or it is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its parts do not come together.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Its parts do not make a file.
    #[error(transparent)]
    Gguf(#[from] gguf::GgufError),
    /// The file cannot be written.
    #[error("writing the model: {0}")]
    Io(#[from] io::Error),
}

impl Store {
    /// Writes the model as one GGUF, each shard verified: its import would have the same id. `progress` is told the
    /// bytes written.
    ///
    /// # Errors
    /// Not all of the model is here, or the file cannot be written.
    pub fn assemble(
        &self,
        id: ModelId,
        out: &mut File,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), AssembleError> {
        let reader = self.reader(id)?;
        let manifest = reader.manifest();
        let described = manifest.vocab_header(&self.metadata(id)?)?;
        let tensors = manifest.tensors.iter().map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            dims: tensor.dims.clone(),
            ty: tensor.ty,
            offset: 0,
        });
        let header = Header::new(described.alignment, described.kv, tensors.collect())?;
        let mut writer = BufWriter::new(&mut *out);
        header.write(&mut writer)?;
        writer.flush()?;
        drop(writer);
        let (mut bytes, mut done) = (Vec::new(), 0u64);
        let mut end = header.data_offset;
        for tensor in &header.tensors {
            reader.read_tensor(&tensor.name, &mut bytes)?;
            out.seek(SeekFrom::Start(
                header.data_offset.saturating_add(tensor.offset),
            ))?;
            out.write_all(&bytes)?;
            done = done.saturating_add(bytes.len() as u64);
            end = out.stream_position()?;
            progress(done);
        }
        Ok(out.set_len(end.saturating_add(header.padding(end)))?)
    }
}
