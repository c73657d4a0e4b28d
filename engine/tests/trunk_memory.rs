//! What a trunk takes of the machine's memory, as the system sees it: not its experts. Linux only: others do not
//! say. One test, because the whole process is measured.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::sync::Arc;

use engine::{
    ExpertCall, ExpertError, ExpertHolders, ExpertLayout, ExpertReply, FileSource, HolderId,
    RandomWeights, WholeModel, random_model,
};
use gguf::TensorType;
use support::{N_CTX, process_bytes, tiny};

/// Nobody has any.
struct Nobody;

impl ExpertHolders for Nobody {
    fn holder_of(&self, _: u32, _: u32) -> Option<HolderId> {
        None
    }

    fn ask(&self, _: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
        Err(ExpertError::Backend("nobody is here".into()))
    }
}

#[test]
fn a_trunk_is_resident_without_its_experts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut shape = tiny("qwen3moe");
    (shape.n_layer, shape.n_ff, shape.n_expert) = (2, 1024, 32);
    let weights = RandomWeights::One(TensorType::F32);
    random_model("qwen3moe", &shape, weights, 1, &path).unwrap();
    let header = FileSource::open(&path).unwrap();
    let layout = ExpertLayout::new(header.header()).unwrap();
    let per_layer = layout.expert_bytes(0) * u64::from(layout.n_expert());
    let (experts, tensor) = (2 * per_layer, per_layer / 3);

    let resident = || process_bytes("status", "VmRSS:");
    let before = resident();
    let mut trunk = WholeModel::load_trunk(&path, N_CTX, 1, Arc::new(Nobody)).unwrap();
    let taken = resident().saturating_sub(before);
    let most = process_bytes("status", "VmHWM:").saturating_sub(before);
    eprintln!("{experts} bytes of experts; {taken} resident, {most} while loading");
    assert!(experts > 200_000_000, "worth looking at");
    assert!(taken < 40_000_000, "{taken} of {experts}");
    // The loader reads one tensor's hole at a time.
    assert!(most < tensor + 60_000_000, "{most} while loading");
    assert!(trunk.tensor_bytes() < 10_000_000);

    let why = trunk.run(0, &[1], engine::Want::Last, &mut Vec::new());
    let why = why.unwrap_err().to_string();
    assert!(why.contains("of layer 0 is held by nobody"), "{why}");
    drop(trunk);

    let before = resident();
    let whole = WholeModel::load(&path, N_CTX, 1).unwrap();
    let taken = resident().saturating_sub(before);
    assert!(taken > experts, "the whole model takes {taken}");
    assert!(whole.tensor_bytes() > experts);
}
