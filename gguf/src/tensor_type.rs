//! The table of ggml tensor types: id, name, elements and bytes of a block.
//!
//! The engine's tests hold it against the ggml that is linked.

use serde::{Deserialize, Serialize};

use crate::GgufError;

macro_rules! tensor_types {
    ($(($id:literal, $variant:ident, $name:literal, $block:literal, $bytes:literal),)*) => {
        /// Type of a tensor's elements, named as ggml names it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(into = "u32", try_from = "u32")]
        #[allow(non_camel_case_types)]
        pub enum TensorType {
            $(#[doc = concat!("ggml type ", $id, ", `", $name, "`.")] $variant,)*
        }

        impl TensorType {
            /// Every type known here.
            pub const ALL: &'static [TensorType] = &[$(TensorType::$variant,)*];

            /// ggml's number for it.
            pub fn id(self) -> u32 {
                match self { $(TensorType::$variant => $id,)* }
            }

            /// ggml's name for it.
            pub fn name(self) -> &'static str {
                match self { $(TensorType::$variant => $name,)* }
            }

            /// Elements in one block.
            pub fn block_len(self) -> u64 {
                match self { $(TensorType::$variant => $block,)* }
            }

            /// Bytes of one block.
            pub fn block_bytes(self) -> u64 {
                match self { $(TensorType::$variant => $bytes,)* }
            }

            /// The type with this number.
            ///
            /// # Errors
            /// A number that is not in the table, removed types included.
            pub fn from_id(id: u32) -> Result<Self, GgufError> {
                match id {
                    $($id => Ok(TensorType::$variant),)*
                    _ => Err(GgufError::UnknownType { what: "tensor", id }),
                }
            }
        }
    };
}

tensor_types! {
    (0, F32, "f32", 1, 4),
    (1, F16, "f16", 1, 2),
    (2, Q4_0, "q4_0", 32, 18),
    (3, Q4_1, "q4_1", 32, 20),
    (6, Q5_0, "q5_0", 32, 22),
    (7, Q5_1, "q5_1", 32, 24),
    (8, Q8_0, "q8_0", 32, 34),
    (9, Q8_1, "q8_1", 32, 36),
    (10, Q2K, "q2_K", 256, 84),
    (11, Q3K, "q3_K", 256, 110),
    (12, Q4K, "q4_K", 256, 144),
    (13, Q5K, "q5_K", 256, 176),
    (14, Q6K, "q6_K", 256, 210),
    (15, Q8K, "q8_K", 256, 292),
    (16, Iq2Xxs, "iq2_xxs", 256, 66),
    (17, Iq2Xs, "iq2_xs", 256, 74),
    (18, Iq3Xxs, "iq3_xxs", 256, 98),
    (19, Iq1S, "iq1_s", 256, 50),
    (20, Iq4Nl, "iq4_nl", 32, 18),
    (21, Iq3S, "iq3_s", 256, 110),
    (22, Iq2S, "iq2_s", 256, 82),
    (23, Iq4Xs, "iq4_xs", 256, 136),
    (24, I8, "i8", 1, 1),
    (25, I16, "i16", 1, 2),
    (26, I32, "i32", 1, 4),
    (27, I64, "i64", 1, 8),
    (28, F64, "f64", 1, 8),
    (29, Iq1M, "iq1_m", 256, 56),
    (30, Bf16, "bf16", 1, 2),
    (34, Tq1_0, "tq1_0", 256, 54),
    (35, Tq2_0, "tq2_0", 256, 66),
    (39, Mxfp4, "mxfp4", 32, 17),
    (40, Nvfp4, "nvfp4", 64, 36),
    (41, Q1_0, "q1_0", 128, 18),
    (42, Q2_0, "q2_0", 64, 18),
}

impl TensorType {
    /// Bytes of a row of `n` elements; `None` when `n` is not whole blocks or
    /// the product overflows.
    pub fn row_bytes(self, n: u64) -> Option<u64> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl From<TensorType> for u32 {
    fn from(ty: TensorType) -> u32 {
        ty.id()
    }
}

impl TryFrom<u32> for TensorType {
    type Error = GgufError;

    fn try_from(id: u32) -> Result<Self, GgufError> {
        Self::from_id(id)
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
