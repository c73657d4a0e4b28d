//! Loads models without their experts.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use gguf::Header;

use super::dispatch::ExpertHolders;
use super::tensors::{ExpertSource, is_expert};
use crate::blueprint::{Blueprint, Fill, StageFile};
use crate::llama::{ExpertDevice, FileModel, Model};
use crate::load::{LoadError, Loaded};
use crate::source::{FileSource, TensorSource};
use crate::stage::EngineError;
use crate::whole::WholeModel;

/// Bytes copied at once.
const COPY_BYTES: u64 = 1 << 20;

impl Loaded {
    /// As [`Loaded::read`], but without the experts, which `holders` compute: their tensors are not read, and
    /// the layers take as much less memory.
    ///
    /// # Errors
    /// As [`Loaded::read`], and a llama.cpp that this was not written for.
    pub fn read_trunk(
        blueprint: &Blueprint,
        spans: &[Range<u32>],
        source: &dyn TensorSource,
        holders: &Arc<dyn ExpertHolders>,
        progress: &mut dyn FnMut(u32),
    ) -> Result<Loaded, LoadError> {
        let trunk = blueprint.without_experts();
        let groups = spans.iter().flat_map(|span| trunk.groups(span)).collect();
        Loaded::read_groups(&trunk, spans, groups, Some(holders), source, progress)
    }
}

impl StageFile {
    /// The same file, with holes where experts are; whether there are any.
    pub(crate) fn without_experts(&mut self) -> bool {
        let mut any = false;
        for fill in &mut self.fills {
            if matches!(fill, Fill::Source(name) if is_expert(name)) {
                *fill = Fill::Hole;
                any = true;
            }
        }
        any
    }
}

impl WholeModel {
    /// The file without its experts, which `holders` compute. Runs every mixture that llama.cpp runs, those too
    /// that are not cut into stages.
    ///
    /// # Errors
    /// As [`WholeModel::load`]; the file has no experts; no room for a copy of
    /// the rest in the temporary directory.
    pub fn load_trunk(
        path: &Path,
        n_ctx: u32,
        n_threads: u32,
        holders: Arc<dyn ExpertHolders>,
    ) -> Result<WholeModel, EngineError> {
        let backend = |why: String| EngineError::Backend(why);
        let (header, file) =
            copy_without_experts(path).map_err(|why| backend(format!("{path:?}: {why}")))?;
        let experts = ExpertDevice::new(holders, 0).map_err(backend)?;
        let model: Model = FileModel::trunk(file, experts).map_err(backend)?;
        WholeModel::of(&model, &header, n_ctx, n_threads)
    }
}

/// A private copy of a file with holes where its experts are.
fn copy_without_experts(path: &Path) -> Result<(Header, File), String> {
    let said = |why: std::io::Error| why.to_string();
    let mut from = File::open(path).map_err(said)?;
    let len = from.metadata().map_err(said)?.len();
    let header = Header::read(&mut from, len).map_err(|why| why.to_string())?;
    if !header.tensors.iter().any(|tensor| is_expert(&tensor.name)) {
        return Err("no tensors of experts".into());
    }
    let mut to = tempfile::tempfile().map_err(said)?;
    to.set_len(len).map_err(said)?;
    copy(&mut from, &mut to, 0..header.data_offset).map_err(said)?;
    for tensor in &header.tensors {
        if !is_expert(&tensor.name) {
            let start = header.data_offset + tensor.offset;
            let n_bytes = tensor.n_bytes().map_err(|why| why.to_string())?;
            copy(&mut from, &mut to, start..start + n_bytes).map_err(said)?;
        }
    }
    to.seek(SeekFrom::Start(0)).map_err(said)?;
    Ok((header, to))
}

fn copy(from: &mut File, to: &mut File, range: Range<u64>) -> std::io::Result<()> {
    from.seek(SeekFrom::Start(range.start))?;
    to.seek(SeekFrom::Start(range.start))?;
    let mut left = range.end - range.start;
    let mut buffer = vec![0; COPY_BYTES.min(left) as usize];
    while left > 0 {
        let part = &mut buffer[..COPY_BYTES.min(left) as usize];
        from.read_exact(part)?;
        to.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

impl ExpertSource for FileSource {
    fn read_expert(&self, name: &str, expert: u32, out: &mut Vec<u8>) -> std::io::Result<()> {
        let missing =
            || std::io::Error::new(std::io::ErrorKind::NotFound, format!("no tensor `{name}`"));
        let tensor = self.header().tensor(name).ok_or_else(missing)?;
        let n_bytes = tensor.n_bytes().map_err(std::io::Error::other)?;
        // Experts are the slowest dimension.
        let experts = tensor.dims.last().copied().unwrap_or(1).max(1);
        let len = n_bytes / experts;
        if u64::from(expert) >= experts {
            return Err(missing());
        }
        self.read_part(tensor.offset + len * u64::from(expert), len, out)
    }
}
