//! A GGUF in one file or several, as one header and a place for each tensor.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use gguf::{GgufError, Header, TensorInfo, Value};
use serde::{Deserialize, Serialize};

use crate::import::ImportError;

/// Most files of one model.
const FILES_MAX: u32 = 1024;

/// A file as it was when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileMark {
    /// Absolute path.
    pub(crate) path: PathBuf,
    /// Bytes.
    pub(crate) len: u64,
    /// Last change, ns since 1970.
    pub(crate) mtime_ns: u64,
}

impl FileMark {
    pub(crate) fn of(path: &Path, file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mtime = metadata.modified()?.duration_since(UNIX_EPOCH);
        Ok(Self {
            path: path.to_owned(),
            len: metadata.len(),
            mtime_ns: mtime.map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX)),
        })
    }
}

/// An opened GGUF: its files, all settings, all tensors.
#[derive(Debug)]
pub struct GgufFiles {
    pub(crate) files: Vec<(File, FileMark)>,
    /// Settings, without those that say how the model was split into files.
    pub kv: Vec<(String, Value)>,
    /// Tensors; an offset is from the start of its file.
    pub tensors: Vec<TensorInfo>,
    pub(crate) file_of: Vec<u32>,
}

impl GgufFiles {
    /// Opens the model that `path` is, or is one file of.
    ///
    /// # Errors
    /// No GGUF, a hostile one, or files missing or not belonging together.
    pub fn open(path: &Path) -> Result<GgufFiles, ImportError> {
        let io_at = |path: &Path, source| ImportError::Io {
            path: path.to_owned(),
            source,
        };
        path.metadata().map_err(|e| io_at(path, e))?;
        let path = place(path).map_err(|e| io_at(path, e))?;
        let mut all = GgufFiles {
            files: Vec::new(),
            kv: Vec::new(),
            tensors: Vec::new(),
            file_of: Vec::new(),
        };
        let name = SplitName::parse(&path);
        let count = name.as_ref().map_or(1, |name| name.count);
        for no in 0..count {
            let part = name.as_ref().map_or(path.clone(), |name| name.file(no));
            // Looked at before it is opened: opening a pipe waits for its other end.
            if !part.metadata().map_err(|e| io_at(&part, e))?.is_file() {
                return Err(ImportError::NotAFile { path: part });
            }
            let file = File::open(&part).map_err(|e| io_at(&part, e))?;
            let mark = FileMark::of(&part, &file).map_err(|e| io_at(&part, e))?;
            let header =
                Header::read(&mut &file, mark.len).map_err(|source| ImportError::Gguf {
                    path: part.clone(),
                    source,
                })?;
            check_split(&part, &header, no, count)?;
            all.add(header, file, mark, no)?;
        }
        Ok(all)
    }

    fn add(
        &mut self,
        header: Header,
        file: File,
        mark: FileMark,
        no: u32,
    ) -> Result<(), ImportError> {
        let Header {
            kv,
            tensors,
            data_offset,
            ..
        } = header;
        if no == 0 {
            self.kv = kv;
            self.kv.retain(|(key, _)| !key.starts_with("split."));
        }
        for mut tensor in tensors {
            tensor.offset = tensor.offset.saturating_add(data_offset);
            self.tensors.push(tensor);
            self.file_of.push(no);
        }
        if self.tensors.len() as u64 > gguf::TENSOR_COUNT_MAX {
            return Err(ImportError::Gguf {
                path: mark.path,
                source: GgufError::TooMany {
                    what: "number of tensors",
                    value: self.tensors.len() as u64,
                    max: gguf::TENSOR_COUNT_MAX,
                },
            });
        }
        self.files.push((file, mark));
        Ok(())
    }
}

/// The absolute path of a file under its own name. Links of its folder are followed, its own is not: the parts
/// of a model find each other by their names, and in a cache a name may be a link to bytes called by a hash.
pub(crate) fn place(path: &Path) -> io::Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return path.canonicalize();
    };
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    Ok(folder.unwrap_or(Path::new(".")).canonicalize()?.join(name))
}

/// `stem-00002-of-00005.gguf`.
struct SplitName {
    folder: PathBuf,
    stem: String,
    count: u32,
}

impl SplitName {
    fn parse(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, no) = rest.rsplit_once('-')?;
        let five = |digits: &str| match digits.len() {
            5 => digits.parse::<u32>().ok(),
            _ => None,
        };
        let (no, count) = (five(no)?, five(count)?);
        ((1..=count).contains(&no) && count <= FILES_MAX).then(|| Self {
            folder: path.parent().unwrap_or(Path::new("")).to_owned(),
            stem: stem.to_owned(),
            count,
        })
    }

    fn file(&self, no: u32) -> PathBuf {
        let Self {
            folder,
            stem,
            count,
        } = self;
        folder.join(format!("{stem}-{:05}-of-{count:05}.gguf", no + 1))
    }
}

/// The file's own settings must agree with its name.
fn check_split(path: &Path, header: &Header, no: u32, count: u32) -> Result<(), ImportError> {
    let number = |key| header.get(key).and_then(Value::as_u64);
    let found_count = number("split.count").unwrap_or(1).max(1);
    let found_no = number("split.no").unwrap_or(0);
    if (found_no, found_count) == (no.into(), count.into()) {
        return Ok(());
    }
    Err(ImportError::Split {
        path: path.to_owned(),
        found_no: found_no.saturating_add(1),
        found_count,
        no: no + 1,
        count,
    })
}
