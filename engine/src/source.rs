//! Where tensor bytes come from.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use gguf::{GgufError, Header};

/// Gives whole tensors by their original GGUF names (`blk.7.attn_q.weight`).
/// What it gives is taken as verified: the engine only checks lengths.
pub trait TensorSource {
    /// Replaces `out` by the tensor's bytes.
    ///
    /// # Errors
    /// Whatever kept it from reading them, named so that a user can act on it.
    fn read(&self, name: &str, out: &mut Vec<u8>) -> io::Result<()>;
}

/// Tensors of one GGUF file on disk, unverified: for tests, benches and local
/// runs of a file the user named.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    header: Header,
}

impl FileSource {
    /// Opens the file and reads its header.
    ///
    /// # Errors
    /// The file cannot be read or is not a GGUF.
    pub fn open(path: &Path) -> Result<FileSource, GgufError> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let header = Header::read(&mut BufReader::new(&file), len)?;
        Ok(FileSource { file, header })
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Replaces `out` by bytes from `offset` of the data on.
    pub(crate) fn read_part(&self, offset: u64, len: u64, out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        out.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.header.data_offset + offset))?;
        file.read_exact(out)
    }
}

impl TensorSource for FileSource {
    fn read(&self, name: &str, out: &mut Vec<u8>) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no tensor `{name}`"));
        let tensor = self.header.tensor(name).ok_or_else(missing)?;
        let n_bytes = tensor.n_bytes().map_err(io::Error::other)?;
        self.read_part(tensor.offset, n_bytes, out)
    }
}
