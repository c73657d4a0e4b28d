//! Holds experts and computes rows with them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Activation, ExpertCall, ExpertError, ExpertReply, Form, Group};
use super::tensors::{ExpertLayout, ExpertSource};
use crate::llama::{ExpertCpu, ExpertWeights, Job};

/// Weight of the newest go in the speed: it follows within some twenty tokens.
const NEWEST: f64 = 0.1;
/// How long a measurement without any call may take.
const MEASURE_MAX: Duration = Duration::from_millis(50);
/// Goes of it at most; the first, which may find the weights on disk, does not count.
const MEASURE_GOES: u32 = 12;

/// What a holder has and has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HolderStats {
    /// Experts held.
    pub experts: u32,
    /// Bytes of their tensors.
    pub tensor_bytes: u64,
    /// Calls that were answered.
    pub calls: u64,
    /// Rows that went through experts, counted once for each.
    pub rows: u64,
    /// Rows a second through one expert, one row at a time, and when that was last seen: over the latest goes
    /// in which every expert had one row.
    pub rows_s: Option<(f64, Instant)>,
}

/// An expert's weights, read and laid out, on their way to a holder.
pub struct LoadedExpert {
    layer: u32,
    expert: u32,
    weights: ExpertWeights,
}

impl LoadedExpert {
    /// Reads an expert, on any thread.
    ///
    /// # Errors
    /// The model has no such expert, its bytes cannot be had, or its type is not
    /// computed here.
    pub fn read(
        layout: &ExpertLayout,
        layer: u32,
        expert: u32,
        source: &dyn ExpertSource,
    ) -> Result<LoadedExpert, ExpertError> {
        let slices = layout.slices(layer);
        let slices = slices.filter(|_| expert < layout.n_expert());
        let slices = slices.ok_or(ExpertError::NotHeld { layer, expert })?;
        let mut weights = ExpertWeights::new().map_err(ExpertError::Backend)?;
        let mut bytes = Vec::new();
        for (what, slice) in slices {
            let failed = |why: String| {
                let why = format!("tensor `{}` of expert {expert}: {why}", slice.name);
                ExpertError::Backend(why)
            };
            source
                .read_expert(&slice.name, expert, &mut bytes)
                .map_err(|why| failed(why.to_string()))?;
            weights
                .add(*what, slice.ty, [slice.columns, slice.rows], &bytes)
                .map_err(failed)?;
        }
        Ok(LoadedExpert {
            layer,
            expert,
            weights,
        })
    }

    /// Of which layer.
    pub fn layer(&self) -> u32 {
        self.layer
    }

    /// Which.
    pub fn expert(&self) -> u32 {
        self.expert
    }

    /// Bytes of its tensors in memory.
    pub fn bytes(&self) -> u64 {
        self.weights.bytes()
    }
}

/// Experts of a model on this machine. It has no sessions: a call is all it
/// needs to know.
pub struct ExpertHolder {
    layout: Arc<ExpertLayout>,
    experts: BTreeMap<(u32, u32), ExpertWeights>,
    cpu: ExpertCpu,
    stats: HolderStats,
}

impl ExpertHolder {
    /// A holder of nothing yet.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn new(layout: Arc<ExpertLayout>, n_threads: u32) -> Result<ExpertHolder, ExpertError> {
        let cpu = ExpertCpu::new(n_threads.clamp(1, 512)).map_err(ExpertError::Backend)?;
        Ok(ExpertHolder {
            layout,
            experts: BTreeMap::new(),
            cpu,
            stats: HolderStats::default(),
        })
    }

    /// Reads an expert and holds it; one that is held is read again.
    ///
    /// # Errors
    /// The model has no such expert, its bytes cannot be had, or its type is not
    /// computed here.
    pub fn load(
        &mut self,
        layer: u32,
        expert: u32,
        source: &dyn ExpertSource,
    ) -> Result<(), ExpertError> {
        self.add(LoadedExpert::read(&self.layout, layer, expert, source)?);
        Ok(())
    }

    /// Holds an expert that was read by this model's layout; one that is held is replaced.
    pub fn add(&mut self, loaded: LoadedExpert) {
        let LoadedExpert {
            layer,
            expert,
            weights,
        } = loaded;
        self.experts.insert((layer, expert), weights);
        self.count();
        if self.stats.rows_s.is_none() {
            self.measure(layer, expert);
        }
    }

    /// Holds an expert no more; whether it did.
    pub fn unload(&mut self, layer: u32, expert: u32) -> bool {
        let held = self.experts.remove(&(layer, expert)).is_some();
        self.count();
        held
    }

    /// Whether it holds an expert.
    pub fn holds(&self, layer: u32, expert: u32) -> bool {
        self.experts.contains_key(&(layer, expert))
    }

    /// The experts held, by layer and index.
    pub fn held(&self) -> Vec<(u32, u32)> {
        self.experts.keys().copied().collect()
    }

    /// What its experts are made of.
    pub fn layout(&self) -> &Arc<ExpertLayout> {
        &self.layout
    }

    /// What it has and has done.
    pub fn stats(&self) -> HolderStats {
        self.stats.clone()
    }

    /// A first figure for the speed, before anybody asked: what any expert of the layer takes for a row.
    fn measure(&mut self, layer: u32, expert: u32) {
        let activation = match self.layout.gated(layer) {
            true => Activation::SwiGlu,
            false => Activation::Silu,
        };
        let parts = self.layout.parts(layer);
        let n_embd = self.layout.n_embd() as usize;
        let Some(weights) = self.experts.get(&(layer, expert)) else {
            return;
        };
        let job = Job {
            weights,
            form: Form { activation, parts },
            rows: vec![0.5; n_embd],
            n_embd,
        };
        let job = [job];
        let start = Instant::now();
        let mut least: Option<Duration> = None;
        for go in 0..MEASURE_GOES {
            let begun = Instant::now();
            if self.cpu.run(&job).is_err() {
                return;
            }
            let took = begun.elapsed();
            least = match least {
                Some(least) if go > 1 => Some(least.min(took)),
                _ => Some(took),
            };
            if start.elapsed() > MEASURE_MAX {
                break;
            }
        }
        let took = least.unwrap_or(MEASURE_MAX).as_secs_f64().max(1e-9);
        self.stats.rows_s = Some((1.0 / took, Instant::now()));
    }

    /// Takes a go into the speed in which `experts` experts had a row each.
    fn went(&mut self, experts: usize, took: Duration) {
        let value = experts as f64 / took.as_secs_f64().max(1e-9);
        let old = self.stats.rows_s.map_or(value, |(old, _)| old);
        self.stats.rows_s = Some((old + (value - old) * NEWEST, Instant::now()));
    }

    fn count(&mut self) {
        self.stats.experts = self.experts.len() as u32;
        self.stats.tensor_bytes = self.experts.values().map(ExpertWeights::bytes).sum();
    }

    /// Answers several calls in one go, each as if it were alone, bit for bit:
    /// rows of different calls meet the same weights one after the other and
    /// share no operation.
    pub fn compute(&mut self, calls: &[ExpertCall]) -> Vec<Result<ExpertReply, ExpertError>> {
        let checked: Vec<_> = calls.iter().map(|call| self.check(call)).collect();
        // By expert, so that its weights come from memory once.
        let mut order: Vec<(u32, u32, usize, usize)> = Vec::new();
        for (at, call) in calls.iter().enumerate() {
            if checked[at].is_ok() {
                let groups = call.groups.iter().enumerate();
                order.extend(groups.map(|(i, group)| (call.layer, group.expert, at, i)));
            }
        }
        order.sort_unstable();
        let jobs: Vec<Job<'_>> = order
            .iter()
            .filter_map(|&(layer, expert, at, i)| {
                let weights = self.experts.get(&(layer, expert))?;
                Some(job(weights, &calls[at], calls[at].groups.get(i)?))
            })
            .collect();
        let start = Instant::now();
        let computed = match jobs.is_empty() {
            true => Ok(Vec::new()),
            false => self.cpu.run(&jobs),
        };
        let single = jobs.iter().all(|job| job.rows.len() == job.n_embd);
        let n_jobs = jobs.len();
        drop(jobs);
        if single && n_jobs > 0 && computed.is_ok() {
            self.went(n_jobs, start.elapsed());
        }
        let mut rows: BTreeMap<(usize, usize), Vec<f32>> = BTreeMap::new();
        let why = match computed {
            Ok(computed) => {
                let at = order.iter().map(|&(.., at, i)| (at, i));
                rows.extend(at.zip(computed));
                None
            }
            Err(why) => Some(ExpertError::Backend(why)),
        };
        let mut answers = Vec::with_capacity(calls.len());
        for (at, (call, checked)) in calls.iter().zip(checked).enumerate() {
            answers.push(checked.and_then(|()| match &why {
                Some(why) => Err(why.clone()),
                None => Ok(self.reply(at, call, &mut rows)),
            }));
        }
        answers
    }

    fn reply(
        &mut self,
        at: usize,
        call: &ExpertCall,
        computed: &mut BTreeMap<(usize, usize), Vec<f32>>,
    ) -> ExpertReply {
        let groups = 0..call.groups.len();
        let rows: Vec<f32> = groups
            .flat_map(|i| computed.remove(&(at, i)).unwrap_or_default())
            .collect();
        self.stats.calls += 1;
        self.stats.rows += call.rows_out() as u64;
        ExpertReply { rows }
    }

    fn check(&self, call: &ExpertCall) -> Result<(), ExpertError> {
        call.check()?;
        let layer = call.layer;
        if call.n_embd != self.layout.n_embd() {
            let (asked, held) = (call.n_embd, self.layout.n_embd());
            return Err(ExpertError::Call(format!("rows of {asked}, not {held}")));
        }
        for &Group { expert, .. } in &call.groups {
            if !self.holds(layer, expert) {
                return Err(ExpertError::NotHeld { layer, expert });
            }
        }
        let (asked, held) = (call.form.parts, self.layout.parts(layer));
        if asked != held {
            return Err(ExpertError::OtherTensors { layer, asked, held });
        }
        if call.form.activation.gated() != self.layout.gated(layer) {
            let why = format!("{:?} with {held}", call.form.activation);
            return Err(ExpertError::Call(why));
        }
        Ok(())
    }
}

fn job<'a>(weights: &'a ExpertWeights, call: &ExpertCall, group: &Group) -> Job<'a> {
    let n_embd = call.n_embd as usize;
    let picked = group.rows.iter();
    let rows = picked
        .flat_map(|&row| &call.hidden[row as usize * n_embd..][..n_embd])
        .copied()
        .collect();
    Job {
        weights,
        form: call.form,
        rows,
        n_embd,
    }
}

#[cfg(test)]
mod tests {
    use gguf::{Header, TensorInfo, TensorType, Value};

    use super::*;

    const N: usize = 32;
    const N_FF: usize = 64;

    /// Weights from a formula: tensor, expert, index.
    struct Formula;

    fn weight(name: &str, expert: u32, i: usize) -> f32 {
        let seed = name.len() as f32 + 3.0 * expert as f32;
        (seed + 0.37 * i as f32).sin() * 0.4
    }

    impl ExpertSource for Formula {
        fn read_expert(&self, name: &str, expert: u32, out: &mut Vec<u8>) -> std::io::Result<()> {
            out.clear();
            let values = (0..N * N_FF).map(|i| weight(name, expert, i));
            values.for_each(|value| out.extend(value.to_le_bytes()));
            Ok(())
        }
    }

    fn header(parts: &[&str]) -> Header {
        let tensor = |part: &&str| {
            let (columns, rows) = if *part == "down" {
                (N_FF, N)
            } else {
                (N, N_FF)
            };
            TensorInfo {
                name: format!("blk.0.ffn_{part}_exps.weight"),
                dims: vec![columns as u64, rows as u64, 2],
                ty: TensorType::F32,
                offset: 0,
            }
        };
        let kv: Vec<(String, Value)> = vec![
            ("general.architecture".into(), "x".into()),
            ("x.embedding_length".into(), (N as u32).into()),
            ("x.expert_count".into(), 2u32.into()),
        ];
        let tensors = parts.iter().map(tensor).collect();
        Header::new(gguf::ALIGNMENT_DEFAULT, kv, tensors).unwrap()
    }

    fn product(part: &str, row: &[f32], rows: usize) -> Vec<f32> {
        let name = format!("blk.0.ffn_{part}_exps.weight");
        let dot = |r: usize| -> f32 {
            let weights = (0..row.len()).map(|c| weight(&name, 1, r * row.len() + c));
            weights.zip(row).map(|(w, x)| w * x).sum()
        };
        (0..rows).map(dot).collect()
    }

    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + (-x).exp())
    }

    fn gelu(x: f32) -> f32 {
        0.5 * x * (1.0 + (0.797_884_6 * x * (1.0 + 0.044715 * x * x)).tanh())
    }

    /// As the activation's own documentation has it.
    fn expected(activation: Activation, gate: f32, up: f32) -> f32 {
        match activation {
            Activation::SwiGlu => gate * sigmoid(gate) * up,
            Activation::GeGlu | Activation::GeGluErf | Activation::GeGluQuick => gelu(gate) * up,
            Activation::ReGlu => gate.max(0.0) * up,
            Activation::SwiGluOai { alpha, limit } => {
                let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                gate * sigmoid(alpha * gate) * (up + 1.0)
            }
            Activation::SwiGluClamp { limit } => {
                let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                gate * sigmoid(gate) * up
            }
            Activation::SiluLimited { limit } => {
                (gate * sigmoid(gate)).min(limit) * up.clamp(-limit, limit)
            }
            Activation::Silu => up * sigmoid(up),
            Activation::Gelu => gelu(up),
            Activation::Relu => up.max(0.0),
            Activation::ReluSquared => up.max(0.0).powi(2),
        }
    }

    #[test]
    fn every_activation_is_what_it_says() {
        let limit = 0.6;
        let gated = [
            Activation::SwiGlu,
            Activation::GeGlu,
            Activation::ReGlu,
            Activation::GeGluErf,
            Activation::GeGluQuick,
            Activation::SwiGluOai { alpha: 1.7, limit },
            Activation::SwiGluClamp { limit },
            Activation::SiluLimited { limit },
        ];
        let plain = [
            Activation::Silu,
            Activation::Gelu,
            Activation::Relu,
            Activation::ReluSquared,
        ];
        for activation in gated.into_iter().chain(plain) {
            let parts: &[&str] = match activation.gated() {
                true => &["gate", "up", "down"],
                false => &["up", "down"],
            };
            let layout = Arc::new(ExpertLayout::new(&header(parts)).unwrap());
            let parts = layout.parts(0);
            let mut holder = ExpertHolder::new(layout, 1).unwrap();
            holder.load(0, 1, &Formula).unwrap();
            let hidden: Vec<f32> = (0..N).map(|i| (1.3 * i as f32).cos()).collect();
            let call = ExpertCall {
                layer: 0,
                form: Form { activation, parts },
                n_embd: N as u32,
                groups: vec![Group {
                    expert: 1,
                    rows: vec![0],
                }],
                hidden: hidden.clone(),
            };
            let got = holder.compute(&[call]).remove(0).unwrap().rows;
            let (gate, up) = (product("gate", &hidden, N_FF), product("up", &hidden, N_FF));
            let inner: Vec<f32> = gate
                .iter()
                .zip(&up)
                .map(|(gate, up)| expected(activation, *gate, *up))
                .collect();
            for (got, expected) in got.iter().zip(product("down", &inner, N)) {
                let near = (got - expected).abs() < 0.05 + 0.03 * expected.abs();
                assert!(near, "{activation:?}: {got}, {expected} expected");
            }
        }
    }
}
