//! Hidden states as bytes. What is not finite is refused when it arrives: it would poison the KV of
//! every hop after, and some kernels crash on it.

use crate::Dtype;

/// Numbers in a block of `q8_0`.
const BLOCK: usize = 32;
/// Bytes of a block of `q8_0`: an f16 scale, then the numbers.
const BLOCK_BYTES: usize = 2 + BLOCK;

/// Why bytes are no rows. The sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// Not whole rows.
    #[error("{len} bytes are not rows of {row} ({n_embd} numbers in {dtype})")]
    Length {
        /// Bytes there are.
        len: usize,
        /// Bytes of a row.
        row: usize,
        /// Numbers in a row.
        n_embd: u32,
        /// Their type.
        dtype: Dtype,
    },
    /// NaN or infinity.
    #[error("row {row} holds a number that is not finite")]
    NotFinite {
        /// The first row that does.
        row: usize,
    },
}

/// Appends whole rows of `n_embd` numbers to `out`.
///
/// A number that the type cannot hold is written as one that is not finite, so that the receiver
/// refuses it rather than compute with something else.
pub fn encode(rows: &[f32], n_embd: u32, dtype: Dtype, out: &mut Vec<u8>) {
    // Whole buffers at a time, so that the loops become vector code: this runs for every frame.
    let start = out.len();
    match dtype {
        Dtype::F32 => {
            out.resize(start + 4 * rows.len(), 0);
            let places = out[start..].chunks_exact_mut(4);
            places
                .zip(rows)
                .for_each(|(place, x)| place.copy_from_slice(&x.to_le_bytes()));
        }
        Dtype::Bf16 => {
            out.resize(start + 2 * rows.len(), 0);
            let places = out[start..].chunks_exact_mut(2);
            places
                .zip(rows)
                .for_each(|(place, x)| place.copy_from_slice(&to_bf16(*x).to_le_bytes()));
        }
        Dtype::Q8_0 => rows
            .chunks(n_embd.max(1) as usize)
            .flat_map(|row| row.chunks(BLOCK))
            .for_each(|block| put_block(block, out)),
    }
}

/// Appends the rows in `bytes` to `out`; on an error `out` is as before.
///
/// # Errors
/// Bytes that are not whole rows, NaN, infinity.
pub fn decode(
    bytes: &[u8],
    n_embd: u32,
    dtype: Dtype,
    out: &mut Vec<f32>,
) -> Result<(), ActivationError> {
    let row = dtype.row_len(n_embd);
    if row == 0 || !bytes.len().is_multiple_of(row) {
        return Err(ActivationError::Length {
            len: bytes.len(),
            row,
            n_embd,
            dtype,
        });
    }
    let start = out.len();
    let n_embd = n_embd as usize;
    out.reserve(bytes.len() / row * n_embd);
    match dtype {
        Dtype::F32 => out.extend(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        ),
        Dtype::Bf16 => out.extend(
            bytes
                .chunks_exact(2)
                .map(|b| from_bf16(u16::from_le_bytes([b[0], b[1]]))),
        ),
        Dtype::Q8_0 => bytes
            .chunks_exact(row)
            .for_each(|row| take_row(row, n_embd, out)),
    }
    let all_finite = out[start..].iter().fold(true, |all, x| all & x.is_finite());
    if all_finite {
        return Ok(());
    }
    let bad = out[start..].iter().position(|x| !x.is_finite());
    out.truncate(start);
    Err(ActivationError::NotFinite {
        row: bad.unwrap_or(0) / n_embd,
    })
}

fn put_block(block: &[f32], out: &mut Vec<u8>) {
    let finite = block.iter().all(|x| x.is_finite());
    let largest = block.iter().fold(0f32, |max, x| max.max(x.abs()));
    let scale = if finite { largest / 127.0 } else { f32::NAN };
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    out.extend_from_slice(&to_f16(scale).to_le_bytes());
    // `as` saturates; the last block of an odd row is filled with zeros.
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    out.extend(std::iter::repeat_n(0, BLOCK - block.len()));
}

fn take_row(row: &[u8], n_embd: usize, out: &mut Vec<f32>) {
    let end = out.len() + n_embd;
    for block in row.chunks_exact(BLOCK_BYTES) {
        let scale = from_f16(u16::from_le_bytes([block[0], block[1]]));
        out.extend(block[2..].iter().map(|&q| f32::from(q as i8) * scale));
    }
    out.truncate(end);
}

/// To nearest, ties to even; NaN stays NaN.
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let round = 0x7fff + ((bits >> 16) & 1);
    (bits.wrapping_add(round) >> 16) as u16
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To nearest, ties to even; too large becomes infinity.
fn to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    // 65520 and above round to infinity.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // Below 2^-14 the result is subnormal: adding 0.5 moves the bits to where they belong.
    if magnitude < 0x3880_0000 {
        let aligned = f32::from_bits(magnitude) + 0.5;
        return sign | (aligned.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let odd = (magnitude >> 13) & 1;
    let rebased = magnitude - (112 << 23);
    sign | ((rebased + 0xfff + odd) >> 13) as u16
}

fn from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(bits >> 10) & 0x1f, u32::from(bits & 0x3ff));
    let magnitude = match (exponent, fraction) {
        (0, _) => (fraction as f32 * (1.0 / 16_777_216.0)).to_bits(),
        (31, _) => 0x7f80_0000 | (fraction << 13),
        _ => ((exponent + 112) << 23) | (fraction << 13),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_goes_there_and_back() {
        for bits in 0..=u16::MAX {
            let x = from_f16(bits);
            if x.is_nan() {
                assert!(from_f16(to_f16(x)).is_nan());
            } else {
                assert_eq!(to_f16(x), bits, "{x}");
            }
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even() {
        for (x, bits) in [
            (1.0, 0x3c00),
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (65519.0, 0x7bff),
            (65520.0, 0x7c00),
            (5.960_464_5e-8, 0x0001),
            (2.980_232_2e-8, 0x0000),
            (2.99e-8, 0x0001),
            (-2.0, 0xc000),
        ] {
            assert_eq!(to_f16(x), bits, "{x}");
        }
    }
}
