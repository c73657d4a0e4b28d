//! llama.cpp's own embedding of a text, to hold ours against: a whole model with the pooling of its file.

use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::{Model, log};

/// The pooled vector of `tokens`, in one call, as llama.cpp gives it.
pub(crate) fn pooled(model: &Model, tokens: &[u32]) -> Result<Vec<f32>, String> {
    log::clear();
    // SAFETY: no arguments.
    let mut params = unsafe { sys::llama_context_default_params() };
    let n = u32::try_from(tokens.len()).map_err(|_| "too many tokens")?;
    (params.n_ctx, params.n_batch, params.n_ubatch) = (n.max(256), n, n);
    (params.n_threads, params.n_threads_batch) = (1, 1);
    params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.embeddings = true;
    // SAFETY: the model lives.
    let context = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
    let context = NonNull::new(context).ok_or_else(|| log::errors("no context"))?;
    let pooled = run(model, context, tokens);
    // SAFETY: made above, and not used any more.
    unsafe { sys::llama_free(context.as_ptr()) };
    pooled
}

fn run(
    model: &Model,
    context: NonNull<sys::llama_context>,
    tokens: &[u32],
) -> Result<Vec<f32>, String> {
    let mut ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    // SAFETY: `ids` lives through the calls below, which read it only.
    let batch = unsafe { sys::llama_batch_get_one(ids.as_mut_ptr(), ids.len() as i32) };
    // SAFETY: the context lives; the batch is as long as the context takes.
    if unsafe { sys::llama_decode(context.as_ptr(), batch) } != 0 {
        return Err(log::errors("llama_decode failed"));
    }
    // SAFETY: the context lives; the call waits for the computation.
    let row = unsafe { sys::llama_get_embeddings_seq(context.as_ptr(), 0) };
    if row.is_null() {
        return Err("this model pools nothing".into());
    }
    // SAFETY: a pooled row has `n_embd_out` floats and stays until the next call.
    let row = unsafe { std::slice::from_raw_parts(row, model.n_embd_out() as usize) };
    Ok(row.to_vec())
}
