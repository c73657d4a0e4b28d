//! ggml's nodes, read into what the recogniser knows.

use std::ffi::CStr;

use llama_cpp_sys_2 as sys;

use super::abi::BufferType;
use crate::experts::{Glu, Kind, Node, Op, Part, Picks, Source, Unary, Weight};

type Tensor = *const sys::ggml_tensor;

/// How far up a node is followed: the longest way inside a block has 6 steps.
const DEPTH_MAX: u32 = 8;

/// The nodes of a graph that compute, with their tensors.
pub(super) struct Seen {
    pub nodes: Vec<Node>,
    pub tensors: Vec<*mut sys::ggml_tensor>,
}

/// Whether a node is computed with experts' tensors: directly, or with what came
/// from them, up to the last matrix.
///
/// # Safety
/// `node` and all it reads live.
pub(super) unsafe fn belongs_to_experts(node: Tensor, ours: BufferType) -> bool {
    // The tensors themselves, and views of them.
    // SAFETY: the caller's promise.
    if unsafe { weight_of(node, ours) }.is_some() {
        return true;
    }
    for i in 0..3 {
        // SAFETY: the caller's promise; ggml has ten sources a node.
        let src = unsafe { (*node).src[i] };
        // SAFETY: the caller's promise.
        if unsafe { weight_of(src, ours) }.is_some() || unsafe { is_scales(src, ours) } {
            return true;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { is_inside(node, ours, 0) }
}

/// Whether a node's result lies between the first matrices and the last.
///
/// # Safety
/// `node` is null or lives with all it reads.
unsafe fn is_inside(node: Tensor, ours: BufferType, depth: u32) -> bool {
    if node.is_null() || depth > DEPTH_MAX {
        return false;
    }
    // SAFETY: the caller's promise.
    let (op, src) = unsafe { ((*node).op, (*node).src) };
    let inside = |i: usize| {
        // SAFETY: the caller's promise.
        unsafe { is_inside(src[i], ours, depth + 1) }
    };
    match op {
        sys::GGML_OP_MUL_MAT_ID => {
            // SAFETY: the caller's promise.
            let weight = unsafe { weight_of(src[0], ours) };
            weight.is_some_and(|weight| weight.part != Part::Down)
        }
        sys::GGML_OP_ADD_ID | sys::GGML_OP_VIEW | sys::GGML_OP_RESHAPE => inside(0),
        sys::GGML_OP_GLU
        | sys::GGML_OP_UNARY
        | sys::GGML_OP_CLAMP
        | sys::GGML_OP_SCALE
        | sys::GGML_OP_SQR
        | sys::GGML_OP_ADD
        | sys::GGML_OP_MUL => inside(0) || inside(1),
        _ => false,
    }
}

/// Whether this is a scale for each pick: rows got from an expert's repeated one.
///
/// # Safety
/// `node` is null or lives with all it reads.
unsafe fn is_scales(node: Tensor, ours: BufferType) -> bool {
    // SAFETY: the caller's promise.
    let repeated = unsafe { source_of(node, sys::GGML_OP_GET_ROWS) }.unwrap_or(node);
    // SAFETY: the caller's promise.
    let scale = unsafe { source_of(repeated, sys::GGML_OP_REPEAT) };
    // SAFETY: the caller's promise.
    let weight = scale.and_then(|scale| unsafe { weight_of(scale, ours) });
    weight.is_some_and(|weight| weight.kind == Kind::Scale)
}

/// The first source of a node of this operation.
///
/// # Safety
/// `node` is null or lives.
unsafe fn source_of(node: Tensor, op: sys::ggml_op) -> Option<Tensor> {
    // SAFETY: the caller's promise.
    let node = unsafe { node.as_ref() }?;
    (node.op == op).then_some(node.src[0].cast_const())
}

/// What a tensor, or the one it is a view of, is of the experts.
///
/// # Safety
/// `tensor` is null or lives.
unsafe fn weight_of(tensor: Tensor, ours: BufferType) -> Option<Weight> {
    if tensor.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let viewed = unsafe { (*tensor).view_src };
    let root = if viewed.is_null() {
        tensor
    } else {
        viewed.cast_const()
    };
    // SAFETY: a view's source lives as long as the view.
    let buffer = unsafe { (*root).buffer };
    if buffer.is_null() {
        return None;
    }
    // SAFETY: a tensor's buffer lives as long as the tensor.
    if unsafe { sys::ggml_backend_buffer_get_type(buffer) } != ours {
        return None;
    }
    // SAFETY: the name is a C string of at most 64 bytes.
    let name = unsafe { CStr::from_ptr((&raw const (*root).name).cast()) };
    Weight::parse(name.to_str().ok()?)
}

/// Reads a graph; `None` where nothing of it is to be computed: rows entered the
/// model behind it.
///
/// # Safety
/// `graph` lives with all its nodes.
pub(super) unsafe fn read(graph: *mut sys::ggml_cgraph, ours: BufferType) -> Option<Seen> {
    // SAFETY: the caller's promise.
    let n = unsafe { sys::ggml_graph_n_nodes(graph) };
    let mut seen = Seen {
        nodes: Vec::new(),
        tensors: Vec::new(),
    };
    for i in 0..n {
        // SAFETY: `i` is below the count.
        let tensor = unsafe { sys::ggml_graph_node(graph, i) };
        // SAFETY: a node of the graph.
        let (op, flags) = unsafe { ((*tensor).op, (*tensor).flags) };
        let is_view = matches!(
            op,
            sys::GGML_OP_NONE
                | sys::GGML_OP_VIEW
                | sys::GGML_OP_RESHAPE
                | sys::GGML_OP_PERMUTE
                | sys::GGML_OP_TRANSPOSE
        );
        if is_view || flags & sys::GGML_TENSOR_FLAG_COMPUTE as i32 == 0 {
            continue;
        }
        // SAFETY: a node of the graph.
        seen.nodes.push(unsafe { node(tensor, ours) });
        seen.tensors.push(tensor);
    }
    (!seen.nodes.is_empty()).then_some(seen)
}

/// # Safety
/// `tensor` lives with all it reads.
unsafe fn node(tensor: *mut sys::ggml_tensor, ours: BufferType) -> Node {
    let mut src = Vec::with_capacity(3);
    for i in 0..3 {
        // SAFETY: the caller's promise.
        let read = unsafe { (*tensor).src[i] };
        if read.is_null() {
            break;
        }
        // SAFETY: the caller's promise.
        let (viewed, offset) = unsafe { ((*read).view_src, (*read).view_offs) };
        let root = if viewed.is_null() { read } else { viewed };
        src.push(Source {
            id: root.addr(),
            offset,
            // SAFETY: the caller's promise.
            weight: unsafe { weight_of(read, ours) },
        });
    }
    // SAFETY: the caller's promise.
    let params = unsafe { (*tensor).op_params };
    Node {
        id: tensor.addr(),
        // SAFETY: the caller's promise.
        op: unsafe { op(tensor) },
        src,
        params: [0, 1, 2, 3].map(|i| f32::from_bits(params[i].cast_unsigned())),
    }
}

/// # Safety
/// `tensor` lives.
unsafe fn op(tensor: Tensor) -> Op {
    // SAFETY: the caller's promise.
    let op = unsafe { (*tensor).op };
    match op {
        sys::GGML_OP_MUL_MAT_ID => Op::MulMatId,
        sys::GGML_OP_ADD_ID => Op::AddId,
        sys::GGML_OP_MUL => Op::Mul,
        sys::GGML_OP_SQR => Op::Sqr,
        sys::GGML_OP_CLAMP => Op::Clamp,
        sys::GGML_OP_REPEAT => Op::Repeat,
        sys::GGML_OP_GET_ROWS => Op::GetRows,
        sys::GGML_OP_GLU => {
            // SAFETY: a GLU node.
            let glu = unsafe { sys::ggml_get_glu_op(tensor) };
            match glu {
                sys::GGML_GLU_OP_SWIGLU => Op::Glu(Glu::Swi),
                sys::GGML_GLU_OP_GEGLU => Op::Glu(Glu::Ge),
                sys::GGML_GLU_OP_REGLU => Op::Glu(Glu::Re),
                sys::GGML_GLU_OP_GEGLU_ERF => Op::Glu(Glu::GeErf),
                sys::GGML_GLU_OP_GEGLU_QUICK => Op::Glu(Glu::GeQuick),
                sys::GGML_GLU_OP_SWIGLU_OAI => Op::Glu(Glu::SwiOai),
                sys::GGML_GLU_OP_SWIGLU_CLAMP => Op::Glu(Glu::SwiClamp),
                // SAFETY: a GLU operation; its name is static.
                other => Op::Other(unsafe { super::super::text(sys::ggml_glu_op_name(other)) }),
            }
        }
        sys::GGML_OP_UNARY => {
            // SAFETY: a unary node.
            let unary = unsafe { sys::ggml_get_unary_op(tensor) };
            match unary {
                sys::GGML_UNARY_OP_SILU => Op::Unary(Unary::Silu),
                sys::GGML_UNARY_OP_GELU => Op::Unary(Unary::Gelu),
                sys::GGML_UNARY_OP_RELU => Op::Unary(Unary::Relu),
                // SAFETY: a unary operation; its name is static.
                other => Op::Other(unsafe { super::super::text(sys::ggml_unary_op_name(other)) }),
            }
        }
        // SAFETY: an operation; its name is static.
        other => Op::Other(unsafe { super::super::text(sys::ggml_op_name(other)) }),
    }
}

/// The rows and picks that the first node of a block takes; `result` is the
/// block's last node.
///
/// # Safety
/// Both are nodes of a graph whose inputs are computed, in memory of this
/// process.
pub(super) unsafe fn picks(
    first: *mut sys::ggml_tensor,
    result: *mut sys::ggml_tensor,
) -> Result<Picks, String> {
    // SAFETY: the caller's promise; MUL_MAT_ID has three sources.
    let (rows, ids) = unsafe { (&*(*first).src[1], &*(*first).src[2]) };
    // SAFETY: the caller's promise.
    let result = unsafe { &*result };
    let sizes = |tensor: &sys::ggml_tensor| tensor.ne.map(|n| usize::try_from(n).unwrap_or(0));
    let ([n_embd, n_rows, n_tokens, _], [n_used, n_picks, ..]) = (sizes(rows), sizes(ids));
    let kinds = (rows.type_, ids.type_, result.type_)
        == (sys::GGML_TYPE_F32, sys::GGML_TYPE_I32, sys::GGML_TYPE_F32);
    let strides = rows.nb[0] == 4 && ids.nb[0] == 4 && result.nb[0] == 4;
    if !kinds || !strides || n_picks != n_tokens || sizes(result) != [n_embd, n_used, n_tokens, 1] {
        return Err("the rows of experts are not laid out as expected".into());
    }
    if rows.data.is_null() || ids.data.is_null() || n_rows == 0 || n_used == 0 {
        return Err("the rows of experts are not there".into());
    }
    let mut picks = Picks {
        n_embd,
        n_used,
        n_rows,
        experts: Vec::with_capacity(n_used * n_tokens),
        rows: Vec::with_capacity(n_embd * n_rows * n_tokens),
    };
    for token in 0..n_tokens {
        // SAFETY: within the tensor, whose rows lie `nb[1]` apart.
        let of_token = unsafe { ids.data.byte_add(token * ids.nb[1]) };
        // SAFETY: `n_used` numbers, next to each other.
        let of_token = unsafe { std::slice::from_raw_parts(of_token.cast::<i32>(), n_used) };
        picks
            .experts
            .extend(of_token.iter().map(|id| id.cast_unsigned()));
        for row in 0..n_rows {
            // SAFETY: within the tensor, by its strides.
            let row = unsafe { rows.data.byte_add(token * rows.nb[2] + row * rows.nb[1]) };
            // SAFETY: `n_embd` floats, next to each other.
            let row = unsafe { std::slice::from_raw_parts(row.cast::<f32>(), n_embd) };
            picks.rows.extend_from_slice(row);
        }
    }
    Ok(picks)
}

/// Writes a block's result, token after token and pick after pick.
///
/// # Safety
/// `result` is an allocated node in memory of this process, looked at by
/// [`picks`].
pub(super) unsafe fn put(result: *mut sys::ggml_tensor, rows: &[f32]) -> Result<(), String> {
    // SAFETY: the caller's promise.
    let result = unsafe { &*result };
    let [n_embd, n_used, n_tokens, _] = result.ne.map(|n| usize::try_from(n).unwrap_or(0));
    if rows.len() != n_embd * n_used * n_tokens || result.data.is_null() {
        return Err(format!("{} values for a block's result", rows.len()));
    }
    for (at, row) in rows.chunks_exact(n_embd.max(1)).enumerate() {
        let (token, pick) = (at / n_used, at % n_used);
        // SAFETY: within the tensor, by its strides.
        let to = unsafe {
            result
                .data
                .byte_add(token * result.nb[2] + pick * result.nb[1])
        };
        // SAFETY: room for `n_embd` floats; not part of `rows`.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), to.cast::<f32>(), n_embd) };
    }
    Ok(())
}
