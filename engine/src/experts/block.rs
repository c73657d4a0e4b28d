//! Recognises what llama.cpp's graph computes with experts.
//!
//! ```text
//! rows ─┬─▶ gate ─▶ ×scale ─▶ +bias ─┐
//!       └─▶ up ───▶ ×scale ─▶ +bias ─┴▶ activation ─▶ down ─▶ ×scale ─▶ +bias ─▶
//! ```
//!
//! Gate and up may be one matrix; scales, biases and the gate are there or not.
//! Whatever else a graph does with experts is refused by name: nothing is
//! computed that is not understood.

use std::collections::HashMap;

use super::message::{Activation, Form};
use super::tensors::{Kind, Part, Parts, Weight};

/// A node of the graph, as much of it as matters here.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// A number that names it in this graph.
    pub id: usize,
    pub op: Op,
    pub src: Vec<Source>,
    /// Its numbers, in ggml's order.
    pub params: [f32; 4],
}

/// Operations that blocks are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    MulMatId,
    AddId,
    Mul,
    Sqr,
    Clamp,
    Repeat,
    GetRows,
    Glu(Glu),
    Unary(Unary),
    /// By ggml's name.
    Other(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Glu {
    Swi,
    Ge,
    Re,
    GeErf,
    GeQuick,
    SwiOai,
    SwiClamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unary {
    Silu,
    Gelu,
    Relu,
}

/// What a node reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    /// The node, or the one that this is a view of.
    pub id: usize,
    /// Bytes into it.
    pub offset: usize,
    /// Where it is a tensor of experts.
    pub weight: Option<Weight>,
}

/// A block that was recognised.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Block {
    /// As the file counts.
    pub layer: u32,
    pub form: Form,
    /// Index of the first node; its second source holds the rows, its third the
    /// picks.
    pub first: usize,
    /// Index of the node that is the result.
    pub last: usize,
}

/// What is known of a node's result.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Matrix(Part),
    /// A scale, one for each pick.
    Scales(Part),
    UpClamped(f32),
    GateSilu,
    GateSiluClamped(f32),
    Activated(Activation),
}

/// Recognises the block that `nodes` are, in the order they would be computed.
///
/// # Errors
/// What was not expected, for a person.
pub(crate) fn recognise(nodes: &[Node]) -> Result<Block, String> {
    let mut seen = Seen::default();
    for (at, node) in nodes.iter().enumerate() {
        let value = seen.value(at, node).map_err(|why| {
            let layer = seen.layer.map_or(String::new(), |l| format!("layer {l}: "));
            format!("{layer}{why}")
        })?;
        seen.values.insert(node.id, value);
    }
    seen.block(nodes)
}

#[derive(Default)]
struct Seen {
    layer: Option<u32>,
    first: Option<usize>,
    /// The rows and the picks that the first matrices take.
    inputs: Option<(usize, usize)>,
    parts: Parts,
    activation: Option<Activation>,
    values: HashMap<usize, Value>,
}

impl Seen {
    fn of(&self, source: Option<&Source>) -> Option<Value> {
        self.values.get(&source?.id).copied()
    }

    /// Which matrix's result this is; a half of a merged one is gate or up.
    fn matrix(&self, source: Option<&Source>) -> Option<Part> {
        match (self.of(source)?, source?.offset) {
            (Value::Matrix(Part::GateUp), 0) => Some(Part::Gate),
            (Value::Matrix(Part::GateUp), _) => Some(Part::Up),
            (Value::Matrix(part), 0) => Some(part),
            _ => None,
        }
    }

    fn take(&mut self, weight: Weight) -> Result<(), String> {
        if *self.layer.get_or_insert(weight.layer) != weight.layer {
            return Err(format!("experts of layer {} among them", weight.layer));
        }
        if self.parts.has(weight.part, weight.kind) {
            return Err(format!("{weight:?} is used twice"));
        }
        self.parts = self.parts.with(weight.part, weight.kind);
        Ok(())
    }

    fn value(&mut self, at: usize, node: &Node) -> Result<Value, String> {
        let src = |i: usize| node.src.get(i);
        let weight = |i: usize| node.src.get(i).and_then(|source| source.weight);
        let unknown = || Err(format!("{:?} with experts is not known", node.op));
        match &node.op {
            Op::MulMatId => self.mul_mat_id(at, node),
            Op::AddId => match (self.of(src(0)), weight(1)) {
                (Some(Value::Matrix(part)), Some(bias))
                    if (bias.part, bias.kind) == (part, Kind::Bias) =>
                {
                    self.take(bias)?;
                    Ok(Value::Matrix(part))
                }
                _ => unknown(),
            },
            Op::Repeat => match weight(0) {
                Some(scale) if scale.kind == Kind::Scale => {
                    self.take(scale)?;
                    Ok(Value::Scales(scale.part))
                }
                _ => unknown(),
            },
            Op::GetRows => match self.of(src(0)) {
                Some(Value::Scales(part)) => Ok(Value::Scales(part)),
                _ => unknown(),
            },
            Op::Mul => match (self.of(src(0)), self.of(src(1))) {
                (Some(Value::Matrix(part)), Some(Value::Scales(scale)))
                    if part == scale && !self.parts.has(part, Kind::Bias) =>
                {
                    Ok(Value::Matrix(part))
                }
                (Some(Value::GateSiluClamped(limit)), Some(Value::UpClamped(up)))
                    if limit == up =>
                {
                    self.activate(Activation::SiluLimited { limit })
                }
                _ => unknown(),
            },
            Op::Clamp => {
                let [low, high, ..] = node.params;
                match (self.matrix(src(0)), self.of(src(0))) {
                    (Some(Part::Up), _) if low == -high => Ok(Value::UpClamped(high)),
                    (_, Some(Value::GateSilu)) if low == f32::NEG_INFINITY => {
                        Ok(Value::GateSiluClamped(high))
                    }
                    _ => unknown(),
                }
            }
            Op::Glu(glu) => match (self.matrix(src(0)), self.matrix(src(1))) {
                (Some(Part::Gate), Some(Part::Up)) => self.activate(gated(*glu, node.params)),
                _ => unknown(),
            },
            Op::Unary(unary) => match (self.matrix(src(0)), unary) {
                (Some(Part::Gate), Unary::Silu) => Ok(Value::GateSilu),
                (Some(Part::Up), Unary::Silu) => self.activate(Activation::Silu),
                (Some(Part::Up), Unary::Gelu) => self.activate(Activation::Gelu),
                (Some(Part::Up), Unary::Relu) => self.activate(Activation::Relu),
                _ => unknown(),
            },
            Op::Sqr => match self.of(src(0)) {
                Some(Value::Activated(Activation::Relu)) => {
                    self.activation = Some(Activation::ReluSquared);
                    Ok(Value::Activated(Activation::ReluSquared))
                }
                _ => unknown(),
            },
            Op::Other(_) => unknown(),
        }
    }

    fn mul_mat_id(&mut self, at: usize, node: &Node) -> Result<Value, String> {
        let (Some(weight), [_, rows, picks]) =
            (node.src.first().and_then(|s| s.weight), &node.src[..])
        else {
            return Err("MUL_MAT_ID without a matrix of experts".into());
        };
        if weight.kind != Kind::Weight {
            return Err(format!("MUL_MAT_ID with {weight:?}"));
        }
        self.take(weight)?;
        let activated = matches!(self.of(Some(rows)), Some(Value::Activated(_)));
        let inputs = self.inputs.get_or_insert((rows.id, picks.id));
        let fits = match weight.part {
            Part::Down => activated && inputs.1 == picks.id,
            _ => *inputs == (rows.id, picks.id),
        };
        if !fits {
            return Err(format!("{:?} takes other rows than expected", weight.part));
        }
        self.first.get_or_insert(at);
        Ok(Value::Matrix(weight.part))
    }

    fn activate(&mut self, activation: Activation) -> Result<Value, String> {
        if self.activation.replace(activation).is_some() {
            return Err("two activations".into());
        }
        Ok(Value::Activated(activation))
    }

    fn block(&self, nodes: &[Node]) -> Result<Block, String> {
        let last = nodes.len().saturating_sub(1);
        let result = nodes.get(last).and_then(|node| self.values.get(&node.id));
        let activation = self.activation.ok_or("experts without an activation")?;
        let has = |part| self.parts.has(part, Kind::Weight);
        if activation.gated() != (has(Part::Gate) || has(Part::GateUp)) {
            return Err(format!("{activation:?} with {}", self.parts));
        }
        match (result, self.layer, self.first) {
            (Some(Value::Matrix(Part::Down)), Some(layer), Some(first)) => Ok(Block {
                layer,
                form: Form {
                    activation,
                    parts: self.parts,
                },
                first,
                last,
            }),
            _ => Err("the experts' rows end before their last matrix".into()),
        }
    }
}

fn gated(glu: Glu, params: [f32; 4]) -> Activation {
    match glu {
        Glu::Swi => Activation::SwiGlu,
        Glu::Ge => Activation::GeGlu,
        Glu::Re => Activation::ReGlu,
        Glu::GeErf => Activation::GeGluErf,
        Glu::GeQuick => Activation::GeGluQuick,
        Glu::SwiOai => Activation::SwiGluOai {
            alpha: params[2],
            limit: params[3],
        },
        Glu::SwiClamp => Activation::SwiGluClamp { limit: params[3] },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 900;
    const PICKS: usize = 901;

    /// Builds graphs: each node is named by its index.
    #[derive(Default)]
    struct Graph(Vec<Node>);

    impl Graph {
        fn push(&mut self, op: Op, src: &[Source], params: [f32; 4]) -> usize {
            let (id, src) = (self.0.len(), src.to_vec());
            self.0.push(Node {
                id,
                op,
                src,
                params,
            });
            id
        }

        fn matrix(&mut self, part: Part, rows: usize) -> usize {
            let src = [weight(part, Kind::Weight), node(rows), node(PICKS)];
            self.push(Op::MulMatId, &src, [0.0; 4])
        }

        fn bias(&mut self, part: Part, of: usize) -> usize {
            let src = [node(of), weight(part, Kind::Bias), node(PICKS)];
            self.push(Op::AddId, &src, [0.0; 4])
        }

        fn scale(&mut self, part: Part, of: usize) -> usize {
            let all = self.push(Op::Repeat, &[weight(part, Kind::Scale)], [0.0; 4]);
            let picked = self.push(Op::GetRows, &[node(all), node(PICKS)], [0.0; 4]);
            self.push(Op::Mul, &[node(of), node(picked)], [0.0; 4])
        }

        fn glu(&mut self, glu: Glu, gate: Source, up: Source, params: [f32; 4]) -> usize {
            self.push(Op::Glu(glu), &[gate, up], params)
        }
    }

    fn node(id: usize) -> Source {
        Source {
            id,
            offset: 0,
            weight: None,
        }
    }

    fn weight(part: Part, kind: Kind) -> Source {
        let weight = Weight {
            layer: 3,
            part,
            kind,
        };
        Source {
            weight: Some(weight),
            ..node(800 + 10 * part as usize + kind as usize)
        }
    }

    fn plain() -> Graph {
        let mut graph = Graph::default();
        let up = graph.matrix(Part::Up, ROWS);
        let gate = graph.matrix(Part::Gate, ROWS);
        let act = graph.glu(Glu::Swi, node(gate), node(up), [0.0; 4]);
        graph.matrix(Part::Down, act);
        graph
    }

    #[test]
    fn gate_up_and_down() {
        let block = recognise(&plain().0).unwrap();
        let parts = [Part::Gate, Part::Up, Part::Down];
        let parts = parts
            .into_iter()
            .fold(Parts::default(), |all, part| all.with(part, Kind::Weight));
        let activation = Activation::SwiGlu;
        let form = Form { activation, parts };
        let expected = Block {
            layer: 3,
            form,
            first: 0,
            last: 3,
        };
        assert_eq!(block, expected);
    }

    #[test]
    fn biases_scales_and_merged_halves() {
        let mut graph = Graph::default();
        let both = graph.matrix(Part::GateUp, ROWS);
        let both = graph.scale(Part::GateUp, both);
        let both = graph.bias(Part::GateUp, both);
        let up = Source {
            offset: 64,
            ..node(both)
        };
        let params = [0.0, 0.0, 1.702, 7.0];
        let act = graph.glu(Glu::SwiOai, node(both), up, params);
        let down = graph.matrix(Part::Down, act);
        let down = graph.scale(Part::Down, down);
        let down = graph.bias(Part::Down, down);
        let block = recognise(&graph.0).unwrap();
        let oai = Activation::SwiGluOai {
            alpha: 1.702,
            limit: 7.0,
        };
        assert_eq!((block.form.activation, block.last), (oai, down));
        assert!(block.form.parts.has(Part::GateUp, Kind::Scale));
        assert!(block.form.parts.has(Part::Down, Kind::Bias));
        // The halves the other way round.
        let at = act;
        graph.0[at].src.swap(0, 1);
        assert!(recognise(&graph.0).is_err());
    }

    #[test]
    fn limits_and_no_gates() {
        let mut graph = Graph::default();
        let up = graph.matrix(Part::Up, ROWS);
        let gate = graph.matrix(Part::Gate, ROWS);
        let clamped = graph.push(Op::Clamp, &[node(up)], [-5.0, 5.0, 0.0, 0.0]);
        let silu = graph.push(Op::Unary(Unary::Silu), &[node(gate)], [0.0; 4]);
        let limit = [f32::NEG_INFINITY, 5.0, 0.0, 0.0];
        let silu = graph.push(Op::Clamp, &[node(silu)], limit);
        let act = graph.push(Op::Mul, &[node(silu), node(clamped)], [0.0; 4]);
        graph.matrix(Part::Down, act);
        let block = recognise(&graph.0).unwrap();
        let limited = Activation::SiluLimited { limit: 5.0 };
        assert_eq!(block.form.activation, limited);

        let mut graph = Graph::default();
        let up = graph.matrix(Part::Up, ROWS);
        let relu = graph.push(Op::Unary(Unary::Relu), &[node(up)], [0.0; 4]);
        let sqr = graph.push(Op::Sqr, &[node(relu)], [0.0; 4]);
        graph.matrix(Part::Down, sqr);
        let block = recognise(&graph.0).unwrap();
        assert_eq!(block.form.activation, Activation::ReluSquared);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let wrong: [fn(&mut Graph); 6] = [
            |g| g.0[2].op = Op::Other("TANH".into()),
            |g| g.0.truncate(3),
            |g| g.0[1].src[1].id = 77,
            |g| g.0[3].src[2].id = 77,
            |g| g.0[3].src[0] = weight(Part::Up, Kind::Weight),
            |g| {
                g.bias(Part::Up, 3);
            },
        ];
        for (i, wrong) in wrong.into_iter().enumerate() {
            let mut graph = plain();
            wrong(&mut graph);
            let refused = recognise(&graph.0).unwrap_err();
            assert!(!refused.is_empty(), "{i}");
        }
        let mut graph = plain();
        graph.0[2].op = Op::Other("TANH".into());
        let why = recognise(&graph.0).unwrap_err();
        assert!(why.contains("layer 3") && why.contains("TANH"), "{why}");
        assert!(recognise(&[]).is_err());
    }
}
