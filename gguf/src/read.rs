//! Reading a header. Nothing the file says is allocated before it is checked.

use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::header::too_many;
use crate::{Array, GgufError, Header, TensorInfo, TensorType, Text, Value};

/// Most key-value pairs: real files have some dozens.
pub const KV_COUNT_MAX: u64 = 4096;
/// Most tensors: the largest MoE models, unmerged, stay under 100 000.
pub const TENSOR_COUNT_MAX: u64 = 1 << 17;
/// Longest key.
pub const KEY_LEN_MAX: u64 = 1024;
/// Longest tensor name: ggml holds names in 64 bytes with a closing zero.
pub const TENSOR_NAME_MAX: u64 = 63;
/// Longest string: chat templates reach some hundred kilobytes.
pub const STRING_LEN_MAX: u64 = 16 << 20;
/// Most elements in an array of numbers.
pub const ARRAY_LEN_MAX: u64 = 1 << 24;
/// Most elements in an array of strings: an empty one costs 24 bytes of memory
/// for 8 of file, and vocabularies stay under 300 000.
pub const STRING_ARRAY_LEN_MAX: u64 = 1 << 21;
/// Longest header: caps everything above together.
pub const METADATA_BYTES_MAX: u64 = 128 << 20;

const MAGIC: [u8; 4] = *b"GGUF";

impl Header {
    /// Reads and checks the header of a file of `file_len` bytes.
    ///
    /// `file_len` may be `u64::MAX` for a header without its file: then the
    /// places of tensors are not held against the end.
    ///
    /// # Errors
    /// Anything that is not a well-formed GGUF (version 2 or 3, little-endian)
    /// within the limits of this module.
    pub fn read(r: &mut (impl Read + Seek), file_len: u64) -> Result<Header, GgufError> {
        r.seek(SeekFrom::Start(0))?;
        let mut input = Input {
            inner: BufReader::with_capacity(64 << 10, r),
            at: 0,
            end: file_len.min(METADATA_BYTES_MAX),
            file_len,
        };
        input.version()?;
        let n_tensors = input.u64()?;
        let n_kv = input.u64()?;
        too_many("number of tensors", n_tensors, TENSOR_COUNT_MAX)?;
        too_many("number of key-values", n_kv, KV_COUNT_MAX)?;
        // A pair is at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 8 + 4 + 8.
        input.room(n_kv.saturating_mul(13))?;
        input.room(n_tensors.saturating_mul(32))?;

        let mut kv = Vec::with_capacity(n_kv as usize);
        for _ in 0..n_kv {
            let key = input.name("key", KEY_LEN_MAX)?;
            let value = input.value()?;
            kv.push((key, value));
        }
        let mut tensors = Vec::with_capacity(n_tensors as usize);
        for _ in 0..n_tensors {
            tensors.push(input.tensor()?);
        }
        let mut header = Header {
            alignment: 0,
            kv,
            tensors,
            data_offset: 0,
        };
        header.alignment = header.declared_alignment()?;
        header.data_offset = input.at.next_multiple_of(header.alignment.into());
        header.check(file_len)?;
        Ok(header)
    }
}

struct Input<R> {
    inner: R,
    at: u64,
    end: u64,
    file_len: u64,
}

impl<R: Read> Input<R> {
    fn room(&self, needed: u64) -> Result<(), GgufError> {
        if needed <= self.end.saturating_sub(self.at) {
            return Ok(());
        }
        if self.end < self.file_len {
            let value = self.at.saturating_add(needed);
            return too_many("header length in bytes", value, METADATA_BYTES_MAX);
        }
        Err(GgufError::Truncated {
            at: self.at,
            needed,
            file_len: self.file_len,
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        self.room(N as u64)?;
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn version(&mut self) -> Result<(), GgufError> {
        let magic = self.bytes()?;
        if magic != MAGIC {
            return Err(GgufError::Magic(magic));
        }
        match self.u32()? {
            2 | 3 => Ok(()),
            version if (1..=3).contains(&version.swap_bytes()) => Err(GgufError::BigEndian),
            version => Err(GgufError::Version(version)),
        }
    }

    fn text(&mut self, what: &'static str, max: u64) -> Result<Vec<u8>, GgufError> {
        let len = self.u64()?;
        too_many(what, len, max)?;
        self.room(len)?;
        let mut bytes = vec![0; len as usize];
        self.inner.read_exact(&mut bytes)?;
        self.at += len;
        Ok(bytes)
    }

    fn name(&mut self, what: &'static str, max: u64) -> Result<String, GgufError> {
        let bytes = self.text(what, max)?;
        String::from_utf8(bytes).map_err(|_| GgufError::Name {
            what,
            why: "not UTF-8",
        })
    }

    fn string(&mut self) -> Result<Text, GgufError> {
        Ok(Text(self.text("length of a string", STRING_LEN_MAX)?))
    }

    fn bool(&mut self) -> Result<bool, GgufError> {
        match self.bytes()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(GgufError::Bool(other)),
        }
    }

    fn value(&mut self) -> Result<Value, GgufError> {
        Ok(match self.u32()? {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::Str(self.string()?),
            9 => Value::Array(self.array()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            id => return Err(GgufError::UnknownType { what: "value", id }),
        })
    }

    fn array(&mut self) -> Result<Array, GgufError> {
        let id = self.u32()?;
        let len = self.u64()?;
        let (element_min, max) = match id {
            0 | 1 | 7 => (1, ARRAY_LEN_MAX),
            2 | 3 => (2, ARRAY_LEN_MAX),
            4..=6 => (4, ARRAY_LEN_MAX),
            8 => (8, STRING_ARRAY_LEN_MAX),
            10..=12 => (8, ARRAY_LEN_MAX),
            _ => {
                return Err(GgufError::UnknownType {
                    what: "array element",
                    id,
                });
            }
        };
        too_many("length of an array", len, max)?;
        self.room(len.saturating_mul(element_min))?;
        Ok(match id {
            0 => Array::U8(self.many(len, |i| Ok(u8::from_le_bytes(i.bytes()?)))?),
            1 => Array::I8(self.many(len, |i| Ok(i8::from_le_bytes(i.bytes()?)))?),
            2 => Array::U16(self.many(len, |i| Ok(u16::from_le_bytes(i.bytes()?)))?),
            3 => Array::I16(self.many(len, |i| Ok(i16::from_le_bytes(i.bytes()?)))?),
            4 => Array::U32(self.many(len, Self::u32)?),
            5 => Array::I32(self.many(len, |i| Ok(i32::from_le_bytes(i.bytes()?)))?),
            6 => Array::F32(self.many(len, |i| Ok(f32::from_le_bytes(i.bytes()?)))?),
            7 => Array::Bool(self.many(len, Self::bool)?),
            8 => Array::Str(self.many(len, Self::string)?),
            10 => Array::U64(self.many(len, Self::u64)?),
            11 => Array::I64(self.many(len, |i| Ok(i64::from_le_bytes(i.bytes()?)))?),
            _ => Array::F64(self.many(len, |i| Ok(f64::from_le_bytes(i.bytes()?)))?),
        })
    }

    fn many<T>(
        &mut self,
        len: u64,
        mut one: impl FnMut(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        let mut out = Vec::with_capacity(len as usize);
        for _ in 0..len {
            out.push(one(self)?);
        }
        Ok(out)
    }

    fn tensor(&mut self) -> Result<TensorInfo, GgufError> {
        let name = self.name("tensor name", TENSOR_NAME_MAX)?;
        let n_dims = self.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(GgufError::Tensor {
                name,
                why: format!("{n_dims} dimensions, 1 to 4 are possible"),
            });
        }
        let dims = self.many(n_dims.into(), Self::u64)?;
        let ty = TensorType::from_id(self.u32()?)?;
        let offset = self.u64()?;
        Ok(TensorInfo {
            name,
            dims,
            ty,
            offset,
        })
    }
}
