//! Small models written to disk: what the registry's tests import.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests
#![allow(dead_code)] // each test binary uses its part

use std::{fs::File, io::Write, path::Path};

use gguf::{Array, Header, TensorInfo, TensorType, Text, Value};

/// A tiny model, and what its tensors hold.
pub struct Model {
    pub kv: Vec<(String, Value)>,
    pub tensors: Vec<(TensorInfo, Vec<u8>)>,
}

impl Model {
    /// A llama-like model: `n_layer` layers of width 32, 50 tokens.
    pub fn dense(n_layer: u32) -> Model {
        let mut model = Model {
            kv: settings("llama", n_layer),
            tensors: vec![],
        };
        model.tensor("token_embd.weight", &[32, 50], TensorType::F32);
        model.tensor("rope_freqs.weight", &[4], TensorType::F32);
        for layer in 0..n_layer {
            model.tensor(
                &format!("blk.{layer}.attn_q.weight"),
                &[32, 32],
                TensorType::F32,
            );
            model.tensor(
                &format!("blk.{layer}.ffn_down.weight"),
                &[64, 32],
                TensorType::Q8_0,
            );
        }
        model.tensor("output_norm.weight", &[32], TensorType::F32);
        model.tensor("output.weight", &[32, 50], TensorType::F16);
        model
    }

    /// The same without an output matrix of its own.
    pub fn tied(n_layer: u32) -> Model {
        let mut model = Model::dense(n_layer);
        model
            .tensors
            .retain(|(info, _)| info.name != "output.weight");
        model
    }

    /// A mixture of `n_expert` experts.
    pub fn moe(n_layer: u32, n_expert: u32) -> Model {
        let mut model = Model::dense(n_layer);
        model
            .kv
            .push(("llama.expert_count".into(), Value::U32(n_expert)));
        for layer in 0..n_layer {
            model.tensor(
                &format!("blk.{layer}.ffn_gate_inp.weight"),
                &[32, n_expert.into()],
                TensorType::F32,
            );
            for name in ["gate", "up", "down"] {
                let name = format!("blk.{layer}.ffn_{name}_exps.weight");
                model.tensor(&name, &[32, 16, n_expert.into()], TensorType::Q8_0);
            }
        }
        model
    }

    /// Bytes that say where they belong.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) {
        let info = TensorInfo {
            name: name.into(),
            dims: dims.to_vec(),
            ty,
            offset: 0,
        };
        let seed = blake3::hash(name.as_bytes());
        let n_bytes = info.n_bytes().unwrap() as usize;
        let mut bytes = vec![0; n_bytes];
        blake3::Hasher::new_keyed(seed.as_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        self.tensors.push((info, bytes));
    }

    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.kv.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.kv.push((key.into(), value)),
        }
    }

    pub fn bytes_of(&self, name: &str) -> &[u8] {
        &self
            .tensors
            .iter()
            .find(|(info, _)| info.name == name)
            .unwrap()
            .1
    }

    /// Writes one file.
    pub fn write(&self, path: &Path) {
        write_file(path, &self.kv, &self.tensors);
    }

    /// Writes several files as `gguf-split` does: settings in the first.
    pub fn write_split(&self, folder: &Path, stem: &str, count: u16) {
        let per_file = self.tensors.len().div_ceil(count.into());
        for (no, tensors) in (0u16..).zip(self.tensors.chunks(per_file)) {
            let mut kv = if no == 0 { self.kv.clone() } else { vec![] };
            kv.push(("split.no".into(), Value::U16(no)));
            kv.push(("split.count".into(), Value::U16(count)));
            kv.push((
                "split.tensors.count".into(),
                Value::I32(self.tensors.len() as i32),
            ));
            let name = format!("{stem}-{:05}-of-{count:05}.gguf", no + 1);
            write_file(&folder.join(name), &kv, tensors);
        }
    }
}

fn write_file(path: &Path, kv: &[(String, Value)], tensors: &[(TensorInfo, Vec<u8>)]) {
    let infos = tensors.iter().map(|(info, _)| info.clone()).collect();
    let header = Header::new(32, kv.to_vec(), infos).unwrap();
    let mut file = File::create(path).unwrap();
    header.write(&mut file).unwrap();
    for (_, bytes) in tensors {
        file.write_all(bytes).unwrap();
        let padding = header.padding(bytes.len() as u64);
        file.write_all(&vec![0; padding as usize]).unwrap();
    }
}

fn settings(arch: &str, n_layer: u32) -> Vec<(String, Value)> {
    let tokens = (0..50)
        .map(|i| Text::from(format!("token number {i}, rather long")))
        .collect();
    vec![
        ("general.architecture".into(), arch.into()),
        ("general.name".into(), "tiny".into()),
        (format!("{arch}.block_count"), Value::U32(n_layer)),
        (format!("{arch}.embedding_length"), Value::U32(32)),
        (format!("{arch}.context_length"), Value::U32(128)),
        (
            format!("{arch}.attention.head_count"),
            Value::Array(Array::U32(vec![4; n_layer as usize])),
        ),
        ("tokenizer.ggml.model".into(), "llama".into()),
        (
            "tokenizer.ggml.tokens".into(),
            Value::Array(Array::Str(tokens)),
        ),
    ]
}
