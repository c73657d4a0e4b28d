//! Quantised rows, and llama.cpp's quantiser for whole files.

use std::ffi::CString;
use std::path::Path;

use gguf::TensorType;
use llama_cpp_sys_2 as sys;

use super::{log, start};

/// Writes the row `bytes` holds as f32: exactly what ggml's own lookup gives.
pub(crate) fn dequantize_row(
    ty: TensorType,
    bytes: &[u8],
    scratch: &mut Vec<u64>,
    out: &mut [f32],
) -> Result<(), String> {
    if ty.row_bytes(out.len() as u64) != Some(bytes.len() as u64) {
        return Err(format!(
            "{} bytes are not a {ty} row of {}",
            bytes.len(),
            out.len()
        ));
    }
    if ty == TensorType::F32 {
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
        return Ok(());
    }
    // Blocks begin with f16 or f32 fields: give C an aligned copy.
    scratch.clear();
    scratch.resize(bytes.len().div_ceil(8), 0);
    for (word, bytes) in scratch.iter_mut().zip(bytes.chunks(8)) {
        let mut eight = [0; 8];
        eight[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(eight);
    }
    // SAFETY: every id in gguf's table is a ggml type (a test holds them equal).
    let traits = unsafe { sys::ggml_get_type_traits(ty.id()) };
    // SAFETY: null or a static.
    let Some(to_float) = (unsafe { traits.as_ref() }).and_then(|traits| traits.to_float) else {
        return Err(format!("{ty} has no conversion to f32"));
    };
    // SAFETY: `scratch` holds a whole row of `out.len()` elements, checked
    // above; `out` has room for them.
    unsafe { to_float(scratch.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
    Ok(())
}

/// Quantises `rows` rows of `n` floats.
pub(crate) fn quantize_rows(ty: TensorType, values: &[f32], n: usize) -> Result<Vec<u8>, String> {
    let rows = values.len() / n.max(1);
    let row_bytes = ty
        .row_bytes(n as u64)
        .ok_or_else(|| format!("rows of {n} are not {ty}"))?;
    let n_bytes = row_bytes as usize * rows;
    let mut out = vec![0u64; n_bytes.div_ceil(8)];
    let dst = out.as_mut_ptr().cast();
    let null = std::ptr::null();
    // SAFETY: `values` holds `rows` rows of `n`, `out` room for them in `ty`.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            ty.id(),
            values.as_ptr(),
            dst,
            0,
            rows as i64,
            n as i64,
            null,
        )
    };
    if written != n_bytes {
        return Err(format!("{written} bytes written, {n_bytes} expected"));
    }
    Ok(out
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .take(n_bytes)
        .collect())
}

/// Quantises a whole file.
pub(crate) fn quantize_file(input: &Path, output: &Path, ftype: u32) -> Result<(), String> {
    start();
    log::clear();
    let path = |path: &Path| path.to_str().and_then(|path| CString::new(path).ok());
    let (input, output) = path(input).zip(path(output)).ok_or("a path is not UTF-8")?;
    // SAFETY: no arguments.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    params.ftype = ftype;
    params.nthread = 2;
    params.allow_requantize = true;
    // SAFETY: both paths are C strings, the parameters are valid.
    let failed =
        unsafe { sys::llama_model_quantize(input.as_ptr(), output.as_ptr(), &raw const params) };
    if failed == 0 {
        Ok(())
    } else {
        Err(log::errors("not quantised"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_table_is_ggmls() {
        for &ty in TensorType::ALL {
            // SAFETY: plain numbers; the table under test has no id beyond ggml's.
            let (block, bytes, name) = unsafe {
                (
                    sys::ggml_blck_size(ty.id()),
                    sys::ggml_type_size(ty.id()),
                    std::ffi::CStr::from_ptr(sys::ggml_type_name(ty.id())),
                )
            };
            assert_eq!(ty.block_len(), block as u64, "{ty}");
            assert_eq!(ty.block_bytes(), bytes as u64, "{ty}");
            assert_eq!(ty.name(), name.to_str().unwrap());
        }
    }

    #[test]
    fn rows_come_back_about_the_same() {
        let row: Vec<f32> = (0..256).map(|i| (i as f32 / 40.0).sin()).collect();
        for (ty, error) in [
            (TensorType::F32, 0.0),
            (TensorType::F16, 1e-3),
            (TensorType::Bf16, 1e-2),
            (TensorType::Q8_0, 1e-2),
            (TensorType::Q6K, 5e-2),
            (TensorType::Q4K, 2e-1),
        ] {
            let bytes = match ty {
                TensorType::F32 => row.iter().flat_map(|v| v.to_le_bytes()).collect(),
                _ => quantize_rows(ty, &row, 256).unwrap(),
            };
            let mut back = vec![0.0; 256];
            dequantize_row(ty, &bytes, &mut Vec::new(), &mut back).unwrap();
            let worst = row
                .iter()
                .zip(&back)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst <= error, "{ty}: {worst}");
            assert!(dequantize_row(ty, &bytes[1..], &mut Vec::new(), &mut back).is_err());
        }
    }
}
