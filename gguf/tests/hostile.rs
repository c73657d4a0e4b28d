//! Files made to hurt: each is refused by name, quickly, with small memory.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers outside #[test] functions

use std::io::Cursor;

use gguf::{GgufError, Header, TensorInfo, TensorType, Value};

fn le(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn text(s: &[u8]) -> Vec<u8> {
    le(&[&(s.len() as u64).to_le_bytes(), s])
}

fn start(n_tensors: u64, n_kv: u64) -> Vec<u8> {
    le(&[
        b"GGUF",
        &3u32.to_le_bytes(),
        &n_tensors.to_le_bytes(),
        &n_kv.to_le_bytes(),
    ])
}

fn read(bytes: &[u8]) -> Result<Header, GgufError> {
    Header::read(&mut Cursor::new(bytes), bytes.len() as u64)
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes).expect_err("refused").to_string()
}

fn tensor(name: &str, dims: &[u64], ty: TensorType) -> TensorInfo {
    TensorInfo {
        name: name.into(),
        dims: dims.into(),
        ty,
        offset: 0,
    }
}

fn tensor_entry(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name.as_bytes());
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(ty.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

fn with_tensors(entries: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut file = start(entries.len() as u64, 0);
    entries.iter().for_each(|e| file.extend(e));
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

#[test]
fn wrong_magic_and_versions() {
    assert!(matches!(read(b"GGML\x03\0\0\0"), Err(GgufError::Magic(_))));
    let version = |v: u32| le(&[b"GGUF", &v.to_le_bytes(), &[0; 16]]);
    assert!(matches!(read(&version(1)), Err(GgufError::Version(1))));
    assert!(matches!(read(&version(4)), Err(GgufError::Version(4))));
    assert!(matches!(
        read(&version(3u32.swap_bytes())),
        Err(GgufError::BigEndian)
    ));
    assert!(read(&version(2)).is_ok() && read(&version(3)).is_ok());
    assert!(matches!(read(b""), Err(GgufError::Truncated { .. })));
}

#[test]
fn huge_counts_are_refused_before_allocation() {
    for (n_tensors, n_kv) in [(u64::MAX, 0), (0, u64::MAX), (1 << 40, 1), (1, 1 << 40)] {
        assert!(matches!(
            read(&start(n_tensors, n_kv)),
            Err(GgufError::TooMany { .. })
        ));
    }
    // Within the limits but beyond the file.
    assert!(matches!(
        read(&start(100_000, 0)),
        Err(GgufError::Truncated { .. })
    ));
    assert!(matches!(
        read(&start(0, 4000)),
        Err(GgufError::Truncated { .. })
    ));
}

#[test]
fn huge_strings_and_arrays() {
    let value = |tail: &[u8]| le(&[&start(0, 1), &text(b"k"), tail, &[0; 64]]);
    let string = |n: u64| value(&le(&[&8u32.to_le_bytes(), &n.to_le_bytes()]));
    assert!(matches!(
        read(&string(u64::MAX)),
        Err(GgufError::TooMany { .. })
    ));
    assert!(matches!(
        read(&string(1 << 20)),
        Err(GgufError::Truncated { .. })
    ));
    for element in [0u32, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12] {
        let array = |n: u64| {
            value(&le(&[
                &9u32.to_le_bytes(),
                &element.to_le_bytes(),
                &n.to_le_bytes(),
            ]))
        };
        assert!(
            matches!(read(&array(u64::MAX)), Err(GgufError::TooMany { .. })),
            "{element}"
        );
        assert!(
            matches!(read(&array(1 << 20)), Err(GgufError::Truncated { .. })),
            "{element}"
        );
    }
    let nested = value(&le(&[
        &9u32.to_le_bytes(),
        &9u32.to_le_bytes(),
        &1u64.to_le_bytes(),
    ]));
    assert!(matches!(
        read(&nested),
        Err(GgufError::UnknownType {
            what: "array element",
            id: 9
        })
    ));
    let unknown = value(&13u32.to_le_bytes());
    assert!(matches!(
        read(&unknown),
        Err(GgufError::UnknownType {
            what: "value",
            id: 13
        })
    ));
    let bool = value(&le(&[&7u32.to_le_bytes(), &[2]]));
    assert!(matches!(read(&bool), Err(GgufError::Bool(2))));
    let key = le(&[&start(0, 1), &(1u64 << 30).to_le_bytes(), &[0; 64]]);
    assert!(matches!(
        read(&key),
        Err(GgufError::TooMany { what: "key", .. })
    ));
}

#[test]
fn absurd_alignment() {
    for alignment in [0u32, 3, 33, 1 << 17, u32::MAX] {
        let file = le(&[
            &start(0, 1),
            &text(b"general.alignment"),
            &4u32.to_le_bytes(),
            &alignment.to_le_bytes(),
        ]);
        assert!(
            matches!(read(&file), Err(GgufError::Alignment(_))),
            "{alignment}"
        );
    }
    let file = le(&[
        &start(0, 1),
        &text(b"general.alignment"),
        &10u32.to_le_bytes(),
        &[32; 8],
    ]);
    assert!(matches!(read(&file), Err(GgufError::Kind { .. })));
}

#[test]
fn tensors_that_cannot_be() {
    let one = |dims: &[u64], ty: u32, offset: u64| {
        with_tensors(&[tensor_entry("t", dims, ty, offset)], 256)
    };
    assert!(read(&one(&[64], 0, 0)).is_ok());
    assert!(refusal(&one(&[65], 0, 0)).contains("outside the file"));
    assert!(refusal(&one(&[64], 0, 32)).contains("outside the file"));
    assert!(refusal(&one(&[64], 0, u64::MAX - 31)).contains("outside the file"));
    assert!(refusal(&one(&[1], 0, 7)).contains("not a multiple of 32"));
    assert!(refusal(&one(&[0], 0, 0)).contains("impossible shape"));
    assert!(refusal(&one(&[1 << 40, 1 << 40], 0, 0)).contains("impossible shape"));
    assert!(refusal(&one(&[1 << 62], 0, 0)).contains("cannot be"));
    assert!(refusal(&one(&[33], 8, 0)).contains("cannot be"));
    assert!(refusal(&one(&[], 0, 0)).contains("0 dimensions"));
    assert!(refusal(&one(&[1, 1, 1, 1, 1], 0, 0)).contains("5 dimensions"));
    for removed in [4, 5, 31, 32, 33, 36, 37, 38, 43, 99] {
        assert!(refusal(&one(&[1], removed, 0)).contains("unknown tensor type"));
    }
}

#[test]
fn overlaps_and_duplicates() {
    let a = tensor_entry("a", &[16], 0, 0);
    let b = tensor_entry("b", &[16], 0, 32);
    assert!(matches!(
        read(&with_tensors(&[a.clone(), b], 256)),
        Err(GgufError::Overlap(..))
    ));
    let c = tensor_entry("c", &[16], 0, 0);
    assert!(matches!(
        read(&with_tensors(&[a.clone(), c], 256)),
        Err(GgufError::Overlap(..))
    ));
    let again = tensor_entry("a", &[16], 0, 64);
    assert!(matches!(
        read(&with_tensors(&[a, again], 256)),
        Err(GgufError::Duplicate { what: "tensor", .. })
    ));
    let pair = le(&[&text(b"k"), &0u32.to_le_bytes(), &[1]]);
    let file = le(&[&start(0, 2), &pair, &pair, &[0; 32]]);
    assert!(matches!(
        read(&file),
        Err(GgufError::Duplicate { what: "key", .. })
    ));
}

#[test]
fn names() {
    let name = |n: &[u8]| le(&[&start(0, 1), &text(n), &0u32.to_le_bytes(), &[1], &[0; 32]]);
    assert!(matches!(read(&name(b"")), Err(GgufError::Name { .. })));
    assert!(matches!(read(&name(b"a\xff")), Err(GgufError::Name { .. })));
    assert!(matches!(read(&name(b"a\0b")), Err(GgufError::Name { .. })));
    let long = tensor_entry(&"x".repeat(64), &[1], 0, 0);
    assert!(matches!(
        read(&with_tensors(&[long], 64)),
        Err(GgufError::TooMany {
            what: "tensor name",
            value: 64,
            max: 63
        })
    ));
}

#[test]
fn every_truncation_is_refused() {
    let header = Header::new(
        64,
        vec![
            ("general.architecture".into(), "llama".into()),
            ("a".into(), vec![1u32, 2, 3].into()),
            (
                "s".into(),
                vec![gguf::Text::from("x"), gguf::Text(vec![0xff])].into(),
            ),
        ],
        vec![
            tensor("t", &[32, 2], TensorType::Q8_0),
            tensor("u", &[5], TensorType::F32),
        ],
    )
    .unwrap();
    let mut file = Vec::new();
    header.write(&mut file).unwrap();
    assert_eq!(file.len() as u64, header.data_offset);
    assert_eq!(header.data_offset % 64, 0);
    let n_data = header.tensors[1].offset + header.tensors[1].n_bytes().unwrap();
    file.resize(file.len() + n_data as usize, 0);
    assert_eq!(read(&file).unwrap(), header);
    for cut in 0..file.len() {
        assert!(read(&file[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn lookups_name_the_key_and_both_types() {
    let mut header = Header::new(32, vec![("n".into(), Value::U64(1 << 33))], vec![]).unwrap();
    assert_eq!(header.get_u64("n").unwrap(), 1 << 33);
    assert!(header.get_u32("n").unwrap_err().to_string().contains("u64"));
    assert!(matches!(header.get_f32("n"), Err(GgufError::Kind { .. })));
    assert!(matches!(header.get_str("m"), Err(GgufError::Missing(_))));
    header.set("n", 7u32);
    header.set("f", 0.5f32);
    assert_eq!(
        (header.get_u32("n").unwrap(), header.get_f32("f").unwrap()),
        (7, 0.5)
    );
}

#[test]
fn writing_refuses_what_reading_would() {
    let bad = [
        Header::new(33, vec![], vec![]),
        Header::new(32, vec![("".into(), Value::U8(0))], vec![]),
        Header::new(
            32,
            vec![("general.alignment".into(), Value::U32(64))],
            vec![],
        ),
        Header::new(32, vec![], vec![tensor("t", &[31], TensorType::Q4_0)]),
    ];
    assert!(bad.iter().all(Result::is_err));
    let mut header = Header::new(32, vec![], vec![tensor("t", &[8], TensorType::F32)]).unwrap();
    header.data_offset += 32;
    assert!(header.write(&mut Vec::new()).is_err());
}
