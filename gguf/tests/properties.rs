//! write∘read is the identity; no bytes panic.

#![allow(clippy::expect_used)] // helpers outside #[test] functions

use std::io::Cursor;

use gguf::{Array, Header, TensorInfo, TensorType, Text, Value};
use proptest::prelude::*;

fn finite32() -> impl Strategy<Value = f32> {
    any::<f32>().prop_filter("NaN is not equal to itself", |v| !v.is_nan())
}

fn finite64() -> impl Strategy<Value = f64> {
    any::<f64>().prop_filter("NaN is not equal to itself", |v| !v.is_nan())
}

fn texts() -> impl Strategy<Value = Text> {
    prop::collection::vec(any::<u8>(), 0..20).prop_map(Text)
}

fn value() -> impl Strategy<Value = Value> {
    let n = 0..9usize;
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        finite32().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        texts().prop_map(Value::Str),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        finite64().prop_map(Value::F64),
        prop_oneof![
            prop::collection::vec(any::<u8>(), n.clone()).prop_map(Array::U8),
            prop::collection::vec(any::<i8>(), n.clone()).prop_map(Array::I8),
            prop::collection::vec(any::<u16>(), n.clone()).prop_map(Array::U16),
            prop::collection::vec(any::<i16>(), n.clone()).prop_map(Array::I16),
            prop::collection::vec(any::<u32>(), n.clone()).prop_map(Array::U32),
            prop::collection::vec(any::<i32>(), n.clone()).prop_map(Array::I32),
            prop::collection::vec(finite32(), n.clone()).prop_map(Array::F32),
            prop::collection::vec(any::<bool>(), n.clone()).prop_map(Array::Bool),
            prop::collection::vec(texts(), n.clone()).prop_map(Array::Str),
            prop::collection::vec(any::<u64>(), n.clone()).prop_map(Array::U64),
            prop::collection::vec(any::<i64>(), n.clone()).prop_map(Array::I64),
            prop::collection::vec(finite64(), n).prop_map(Array::F64),
        ]
        .prop_map(Value::Array),
    ]
}

fn tensor_type() -> impl Strategy<Value = TensorType> {
    prop::sample::select(TensorType::ALL)
}

prop_compose! {
    fn header()(
        alignment in prop::sample::select(&[1u32, 8, 32, 64, 4096][..]),
        kv in prop::collection::btree_map("[a-z.]{1,20}", value(), 0..8),
        tensors in prop::collection::btree_map(
            "[a-z._0-9]{1,63}",
            (tensor_type(), 1u64..4, prop::collection::vec(1u64..5, 0..3)),
            0..8,
        ),
    ) -> Header {
        let tensors = tensors
            .into_iter()
            .map(|(name, (ty, blocks, rest))| {
                let mut dims = vec![ty.block_len() * blocks];
                dims.extend(rest);
                TensorInfo { name, dims, ty, offset: 0 }
            })
            .collect();
        Header::new(alignment, kv.into_iter().collect(), tensors).expect("well-formed")
    }
}

fn file_of(header: &Header) -> Vec<u8> {
    let mut file = Vec::new();
    header.write(&mut file).expect("written");
    let data = header
        .tensors
        .iter()
        .map(|t| t.offset + t.n_bytes().expect("checked"))
        .max();
    file.resize(file.len() + data.unwrap_or(0) as usize, 0);
    file
}

proptest! {
    #[test]
    fn write_then_read_is_the_identity(header in header()) {
        let file = file_of(&header);
        let read = Header::read(&mut Cursor::new(&file), file.len() as u64).expect("read");
        prop_assert_eq!(&read, &header);
        let mut again = Vec::new();
        read.write(&mut again).expect("written again");
        prop_assert_eq!(&again[..], &file[..again.len()]);
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = Header::read(&mut Cursor::new(&bytes), bytes.len() as u64);
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(bytes);
        let _ = Header::read(&mut Cursor::new(&file), file.len() as u64);
    }

    #[test]
    fn a_changed_byte_never_panics(header in header(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut file = file_of(&header);
        let at = at.index(file.len());
        file[at] = to;
        // A length that lies about the file is refused as well.
        for len in [file.len() as u64, u64::MAX, 0] {
            let _ = Header::read(&mut Cursor::new(&file), len);
        }
    }
}
