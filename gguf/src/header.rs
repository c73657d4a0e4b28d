//! A header in memory: its checks, its layout, and looking keys up.

use std::collections::HashSet;

use crate::read::{KEY_LEN_MAX, KV_COUNT_MAX, TENSOR_COUNT_MAX, TENSOR_NAME_MAX};
use crate::{
    ALIGNMENT_DEFAULT, ALIGNMENT_KEY, ALIGNMENT_MAX, Array, GgufError, TensorType, Text, Value,
};

/// Everything in a GGUF file before the tensor data.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Alignment of tensor data, in bytes.
    pub alignment: u32,
    /// Key-value pairs in file order, `general.alignment` included where the
    /// file has it.
    pub kv: Vec<(String, Value)>,
    /// Tensors in file order.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data begins, from the start of the file.
    pub data_offset: u64,
}

/// One tensor's place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, at most [`TENSOR_NAME_MAX`] bytes.
    pub name: String,
    /// Shape in ggml order (fastest first), one to four dimensions.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// First byte, relative to [`Header::data_offset`].
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    ///
    /// # Errors
    /// A shape with no, too many or zero dimensions, or a product over `i64`.
    pub fn n_elements(&self) -> Result<u64, GgufError> {
        if self.dims.is_empty() || self.dims.len() > 4 {
            return Err(self.bad(format!(
                "{} dimensions, 1 to 4 are possible",
                self.dims.len()
            )));
        }
        self.dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .filter(|&product| product != 0 && i64::try_from(product).is_ok())
            .ok_or_else(|| self.bad(format!("impossible shape {:?}", self.dims)))
    }

    /// Length of the data in bytes.
    ///
    /// # Errors
    /// As [`TensorInfo::n_elements`]; also rows that are not whole blocks.
    pub fn n_bytes(&self) -> Result<u64, GgufError> {
        let elements = self.n_elements()?;
        let row = self.dims[0];
        self.ty
            .row_bytes(row)
            .and_then(|bytes| bytes.checked_mul(elements / row))
            .filter(|&bytes| i64::try_from(bytes).is_ok())
            .ok_or_else(|| {
                self.bad(format!(
                    "{} rows of {row} elements cannot be",
                    self.ty.name()
                ))
            })
    }

    pub(crate) fn bad(&self, why: String) -> GgufError {
        GgufError::Tensor {
            name: self.name.clone(),
            why,
        }
    }
}

impl Header {
    /// A header with its tensors laid out one after the other, each aligned.
    /// The offsets given are ignored.
    ///
    /// # Errors
    /// What [`Header::check`] refuses.
    pub fn new(
        alignment: u32,
        kv: Vec<(String, Value)>,
        tensors: Vec<TensorInfo>,
    ) -> Result<Header, GgufError> {
        let mut header = Header {
            alignment,
            kv,
            tensors,
            data_offset: 0,
        };
        if alignment != ALIGNMENT_DEFAULT && header.get(ALIGNMENT_KEY).is_none() {
            header
                .kv
                .insert(0, (ALIGNMENT_KEY.into(), Value::U32(alignment)));
        }
        let mut end = 0u64;
        for i in 0..header.tensors.len() {
            header.tensors[i].offset = end;
            let n_bytes = header.tensors[i].n_bytes()?;
            end = end
                .checked_add(n_bytes)
                .and_then(|end| end.checked_next_multiple_of(alignment.max(1).into()))
                .ok_or_else(|| header.tensors[i].bad("the file would be too long".into()))?;
        }
        header.data_offset = header.header_bytes()?;
        header.check(u64::MAX)?;
        Ok(header)
    }

    /// Holds everything against the format's rules and `file_len`, the length
    /// of the whole file (`u64::MAX` when there is no file yet).
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self, file_len: u64) -> Result<(), GgufError> {
        check_alignment(self.alignment.into())?;
        if self.declared_alignment()? != self.alignment {
            return Err(GgufError::Alignment(self.alignment.into()));
        }
        too_many("number of key-values", self.kv.len() as u64, KV_COUNT_MAX)?;
        too_many(
            "number of tensors",
            self.tensors.len() as u64,
            TENSOR_COUNT_MAX,
        )?;
        let mut names = HashSet::with_capacity(self.kv.len());
        for (key, _) in &self.kv {
            check_name("key", key, KEY_LEN_MAX)?;
            if !names.insert(key.as_str()) {
                return Err(GgufError::Duplicate {
                    what: "key",
                    name: key.clone(),
                });
            }
        }
        self.check_tensors(file_len)
    }

    fn check_tensors(&self, file_len: u64) -> Result<(), GgufError> {
        let mut names = HashSet::with_capacity(self.tensors.len());
        let mut spans = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            check_name("tensor name", &tensor.name, TENSOR_NAME_MAX)?;
            if !names.insert(tensor.name.as_str()) {
                return Err(GgufError::Duplicate {
                    what: "tensor",
                    name: tensor.name.clone(),
                });
            }
            if !tensor.offset.is_multiple_of(self.alignment.into()) {
                return Err(tensor.bad(format!(
                    "offset {} is not a multiple of {}",
                    tensor.offset, self.alignment
                )));
            }
            let n_bytes = tensor.n_bytes()?;
            let end = tensor.offset.checked_add(n_bytes);
            let in_file = end.and_then(|end| end.checked_add(self.data_offset));
            match (end, in_file) {
                (Some(end), Some(in_file)) if in_file <= file_len => {
                    spans.push((tensor.offset, end, tensor.name.as_str()));
                }
                _ => {
                    return Err(tensor.bad(format!(
                        "{n_bytes} bytes at {} of the data lie outside the file of {file_len}",
                        tensor.offset
                    )));
                }
            }
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            if pair[1].0 < pair[0].1 {
                return Err(GgufError::Overlap(pair[0].2.into(), pair[1].2.into()));
            }
        }
        Ok(())
    }

    /// The alignment the key-values declare.
    pub(crate) fn declared_alignment(&self) -> Result<u32, GgufError> {
        match self.get(ALIGNMENT_KEY) {
            None => Ok(ALIGNMENT_DEFAULT),
            Some(&Value::U32(alignment)) => check_alignment(alignment.into()).map(|()| alignment),
            Some(other) => Err(GgufError::Kind {
                key: ALIGNMENT_KEY.into(),
                found: other.kind(),
                wanted: "u32",
            }),
        }
    }

    /// Bytes of padding that follow `n_bytes` of tensor data.
    pub fn padding(&self, n_bytes: u64) -> u64 {
        let alignment = u64::from(self.alignment.max(1));
        (alignment - n_bytes % alignment) % alignment
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.kv.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Replaces `key`'s value, or appends the pair.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.kv.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.kv.push((key.to_owned(), value)),
        }
    }

    fn get_as<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, GgufError> {
        let value = self
            .get(key)
            .ok_or_else(|| GgufError::Missing(key.into()))?;
        convert(value).ok_or_else(|| GgufError::Kind {
            key: key.into(),
            found: value.kind(),
            wanted,
        })
    }

    /// An integer of any width that fits `u32`.
    ///
    /// # Errors
    /// The key is missing, of another type, or does not fit.
    pub fn get_u32(&self, key: &str) -> Result<u32, GgufError> {
        self.get_as(key, "an unsigned 32-bit number", |v| {
            v.as_u64()?.try_into().ok()
        })
    }

    /// An integer of any width that is not negative.
    ///
    /// # Errors
    /// The key is missing, of another type, or negative.
    pub fn get_u64(&self, key: &str) -> Result<u64, GgufError> {
        self.get_as(key, "an unsigned number", Value::as_u64)
    }

    /// A float of either width, as `f32`.
    ///
    /// # Errors
    /// The key is missing or of another type.
    pub fn get_f32(&self, key: &str) -> Result<f32, GgufError> {
        self.get_as(key, "a float", |v| v.as_f64().map(|v| v as f32))
    }

    /// A bool.
    ///
    /// # Errors
    /// The key is missing or of another type.
    pub fn get_bool(&self, key: &str) -> Result<bool, GgufError> {
        self.get_as(key, "a bool", Value::as_bool)
    }

    /// A string that is UTF-8.
    ///
    /// # Errors
    /// The key is missing, of another type, or not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<&str, GgufError> {
        self.get_as(key, "a UTF-8 string", Value::as_str)
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key is missing or of another type.
    pub fn get_texts(&self, key: &str) -> Result<&[Text], GgufError> {
        self.get_as(key, "an array of strings", |v| match v {
            Value::Array(Array::Str(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }
}

pub(crate) fn check_alignment(alignment: u64) -> Result<(), GgufError> {
    if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX.into() {
        Ok(())
    } else {
        Err(GgufError::Alignment(alignment))
    }
}

pub(crate) fn too_many(what: &'static str, value: u64, max: u64) -> Result<(), GgufError> {
    if value > max {
        Err(GgufError::TooMany { what, value, max })
    } else {
        Ok(())
    }
}

fn check_name(what: &'static str, name: &str, max: u64) -> Result<(), GgufError> {
    if name.is_empty() {
        return Err(GgufError::Name { what, why: "empty" });
    }
    if name.contains('\0') {
        // A C reader would see the name cut short.
        return Err(GgufError::Name {
            what,
            why: "it holds a zero byte",
        });
    }
    too_many(what, name.len() as u64, max)
}
