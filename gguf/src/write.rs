//! Writing a header: version 3, little-endian, one encoding for one header.

use std::io::{self, Write};

use crate::{Array, GgufError, Header, Value};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;

impl Header {
    /// Writes the header and the padding up to [`Header::data_offset`]; the
    /// caller goes on with each tensor's data and its [`Header::padding`].
    ///
    /// # Errors
    /// What [`Header::check`] refuses, a `data_offset` that is not the one this
    /// encoding has, and the writer's own errors.
    pub fn write(&self, w: &mut impl Write) -> Result<(), GgufError> {
        self.check(u64::MAX)?;
        let end = self.header_bytes()?;
        if end != self.data_offset {
            return Err(GgufError::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "data_offset is {}, this header ends at {end}",
                    self.data_offset
                ),
            )));
        }
        let mut out = Counted { inner: w, n: 0 };
        self.put(&mut out)?;
        let padding = vec![0; self.padding(out.n) as usize];
        out.write_all(&padding)?;
        Ok(())
    }

    /// Where tensor data begins when this header is written.
    pub(crate) fn header_bytes(&self) -> Result<u64, GgufError> {
        crate::header::check_alignment(self.alignment.into())?;
        let mut out = Counted {
            inner: io::sink(),
            n: 0,
        };
        self.put(&mut out)?;
        Ok(out.n.next_multiple_of(self.alignment.into()))
    }

    fn put<W: Write>(&self, w: &mut Counted<W>) -> io::Result<()> {
        w.write_all(&MAGIC)?;
        w.write_all(&VERSION.to_le_bytes())?;
        w.write_all(&(self.tensors.len() as u64).to_le_bytes())?;
        w.write_all(&(self.kv.len() as u64).to_le_bytes())?;
        for (key, value) in &self.kv {
            put_text(w, key.as_bytes())?;
            w.write_all(&value.type_id().to_le_bytes())?;
            put_value(w, value)?;
        }
        for tensor in &self.tensors {
            put_text(w, tensor.name.as_bytes())?;
            w.write_all(&(tensor.dims.len() as u32).to_le_bytes())?;
            for dim in &tensor.dims {
                w.write_all(&dim.to_le_bytes())?;
            }
            w.write_all(&tensor.ty.id().to_le_bytes())?;
            w.write_all(&tensor.offset.to_le_bytes())?;
        }
        Ok(())
    }
}

struct Counted<W> {
    inner: W,
    n: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.n += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn put_text(w: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    w.write_all(&(bytes.len() as u64).to_le_bytes())?;
    w.write_all(bytes)
}

fn put_value(w: &mut impl Write, value: &Value) -> io::Result<()> {
    match value {
        Value::U8(v) => w.write_all(&v.to_le_bytes()),
        Value::I8(v) => w.write_all(&v.to_le_bytes()),
        Value::U16(v) => w.write_all(&v.to_le_bytes()),
        Value::I16(v) => w.write_all(&v.to_le_bytes()),
        Value::U32(v) => w.write_all(&v.to_le_bytes()),
        Value::I32(v) => w.write_all(&v.to_le_bytes()),
        Value::F32(v) => w.write_all(&v.to_le_bytes()),
        Value::Bool(v) => w.write_all(&[u8::from(*v)]),
        Value::Str(v) => put_text(w, v.as_bytes()),
        Value::Array(v) => put_array(w, v),
        Value::U64(v) => w.write_all(&v.to_le_bytes()),
        Value::I64(v) => w.write_all(&v.to_le_bytes()),
        Value::F64(v) => w.write_all(&v.to_le_bytes()),
    }
}

fn put_array(w: &mut impl Write, array: &Array) -> io::Result<()> {
    w.write_all(&array.type_id().to_le_bytes())?;
    w.write_all(&(array.len() as u64).to_le_bytes())?;
    match array {
        Array::U8(v) => w.write_all(v),
        Array::I8(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::U16(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::I16(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::U32(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::I32(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::F32(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::Bool(v) => v.iter().try_for_each(|v| w.write_all(&[u8::from(*v)])),
        Array::Str(v) => v.iter().try_for_each(|v| put_text(w, v.as_bytes())),
        Array::U64(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::I64(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
        Array::F64(v) => v.iter().try_for_each(|v| w.write_all(&v.to_le_bytes())),
    }
}
