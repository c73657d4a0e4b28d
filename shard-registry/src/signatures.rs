//! Publishers' signatures, kept beside the manifests they speak of: `models/<id>/signatures/<publisher>`.

use std::{fs, path::PathBuf};

use swarm_proto::{ModelId, ModelSignature};

use crate::store::{Problem, Store, StoreError, entries, problem, read_limited};

/// Signatures that are looked at: more publishers of one model are not expected.
const SIGNATURES_MAX: usize = 64;
/// A signature's text is some 230 bytes.
const FILE_BYTES_MAX: u64 = 512;

impl Store {
    /// Keeps a signature beside its model's manifest; returns the file.
    ///
    /// # Errors
    /// It is wrong; the model is not in the store; the store cannot be written.
    pub fn add_signature(&self, signature: &ModelSignature) -> Result<PathBuf, StoreError> {
        signature.verify()?;
        self.manifest_bytes(signature.model)?;
        let folder = self.path(signature.model, "signatures");
        let path = folder.join(signature.publisher.to_string());
        fs::create_dir_all(&folder).map_err(|source| StoreError::Io {
            path: folder,
            source,
        })?;
        self.write(&path, format!("{signature}\n").as_bytes())?;
        Ok(path)
    }

    /// The signatures on a model that are right, by publisher, and what else lies there.
    pub fn signatures(&self, id: ModelId) -> (Vec<ModelSignature>, Vec<Problem>) {
        let (mut signatures, mut problems) = (Vec::new(), Vec::new());
        let folder = self.path(id, "signatures");
        if !folder.is_dir() {
            return (signatures, problems);
        }
        let paths = entries(&folder, &mut problems);
        for path in paths.into_iter().take(SIGNATURES_MAX) {
            let text = read_limited(&path, FILE_BYTES_MAX).map_err(|e| e.to_string());
            let text = text.and_then(|bytes| String::from_utf8(bytes).map_err(|e| e.to_string()));
            let read = text.and_then(|text| {
                let signature: ModelSignature = text.parse().map_err(wrong)?;
                signature.verify().map_err(wrong)?;
                Ok(signature)
            });
            match read {
                Ok(signature) if signature.model == id => signatures.push(signature),
                Ok(_) => problems.push(problem(&path, "it is of another model")),
                Err(why) => problems.push(problem(&path, why)),
            }
        }
        signatures.sort_unstable_by_key(|signature| signature.publisher);
        signatures.dedup_by_key(|signature| signature.publisher);
        (signatures, problems)
    }
}

fn wrong(e: swarm_proto::ModelSignatureError) -> String {
    e.to_string()
}
