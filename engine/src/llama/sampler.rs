//! A chain of llama.cpp's samplers.

use std::ffi::CString;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::{VocabModel, start};

/// An owned sampler chain.
pub(crate) struct Chain {
    ptr: NonNull<sys::llama_sampler>,
    data: Vec<sys::llama_token_data>,
}

// SAFETY: a chain has no ties to a thread; `&mut self` on every call.
unsafe impl Send for Chain {}

/// One link of a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Link {
    /// Repetition, frequency and presence penalties over the last tokens.
    Penalties {
        n_vocab: u32,
        last: u32,
        repeat: f32,
        frequency: f32,
        presence: f32,
    },
    /// Keeps the best `k`.
    TopK(i32),
    /// Keeps the smallest set of this probability.
    TopP(f32),
    /// Keeps what has this share of the best's probability.
    MinP(f32),
    /// Divides logits.
    Temperature(f32),
    /// Takes the best.
    Greedy,
    /// Draws.
    Draw(u32),
}

impl Chain {
    /// A chain of `links`, the last of which chooses.
    pub(crate) fn new(links: &[Link]) -> Option<Chain> {
        start();
        // SAFETY: no arguments.
        let mut params = unsafe { sys::llama_sampler_chain_default_params() };
        params.no_perf = true;
        // SAFETY: valid parameters.
        let ptr = NonNull::new(unsafe { sys::llama_sampler_chain_init(params) })?;
        let chain = Chain {
            ptr,
            data: Vec::new(),
        };
        for link in links {
            // SAFETY: plain numbers; each returns an owned sampler or null.
            let sampler = unsafe {
                match *link {
                    Link::Penalties {
                        n_vocab,
                        last,
                        repeat,
                        frequency,
                        presence,
                    } => sys::llama_sampler_init_penalties(
                        n_vocab.cast_signed(),
                        last.cast_signed(),
                        repeat,
                        frequency,
                        presence,
                    ),
                    Link::TopK(k) => sys::llama_sampler_init_top_k(k),
                    Link::TopP(p) => sys::llama_sampler_init_top_p(p, 1),
                    Link::MinP(p) => sys::llama_sampler_init_min_p(p, 1),
                    Link::Temperature(t) => sys::llama_sampler_init_temp(t),
                    Link::Greedy => sys::llama_sampler_init_greedy(),
                    Link::Draw(seed) => sys::llama_sampler_init_dist(seed),
                }
            };
            NonNull::new(sampler)?;
            // SAFETY: both live; the chain takes ownership.
            unsafe { sys::llama_sampler_chain_add(ptr.as_ptr(), sampler) };
        }
        Some(chain)
    }

    /// The id chosen among `candidates`; `None` when nothing was.
    pub(crate) fn choose(&mut self, candidates: &[(u32, f32)], sorted: bool) -> Option<u32> {
        let mut array = array_of(&mut self.data, candidates.iter(), sorted);
        // SAFETY: the array is ours and not empty; samplers stay inside it.
        unsafe { sys::llama_sampler_apply(self.ptr.as_ptr(), &raw mut array) };
        let selected = usize::try_from(array.selected)
            .ok()
            .filter(|&i| i < array.size)?;
        // SAFETY: a sampler may have moved `data` to memory of its own, which
        // lives until the next call; `selected` is below its size.
        let chosen = unsafe { *array.data.add(selected) };
        u32::try_from(chosen.id).ok()
    }

    /// Tells the samplers what was chosen.
    pub(crate) fn accept(&mut self, id: u32) {
        // SAFETY: the chain lives.
        unsafe { sys::llama_sampler_accept(self.ptr.as_ptr(), id.cast_signed()) };
    }

    /// Forgets what was accepted and seeds anew.
    pub(crate) fn reset(&mut self) {
        // SAFETY: the chain lives.
        unsafe { sys::llama_sampler_reset(self.ptr.as_ptr()) };
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: ours, with the samplers in it.
        unsafe { sys::llama_sampler_free(self.ptr.as_ptr()) };
    }
}

/// How far a grammar has come in a text.
pub(crate) struct GrammarState {
    ptr: NonNull<sys::llama_sampler>,
    /// The grammar reads its tokens from here.
    vocab: VocabModel,
    data: Vec<sys::llama_token_data>,
}

// SAFETY: as a chain; the vocabulary is read-only.
unsafe impl Send for GrammarState {}

impl GrammarState {
    /// At the beginning of `text`'s rule `root`; `None` where it is no grammar.
    pub(crate) fn new(vocab: &VocabModel, text: &str) -> Option<GrammarState> {
        let text = CString::new(text).ok()?;
        // SAFETY: the vocabulary lives as long as this; both texts are C strings. The parser catches
        // what it throws.
        let sampler = unsafe {
            sys::llama_sampler_init_grammar(vocab.ptr(), text.as_ptr(), c"root".as_ptr())
        };
        Some(GrammarState {
            ptr: NonNull::new(sampler)?,
            vocab: vocab.clone(),
            data: Vec::new(),
        })
    }

    /// Those of `candidates` that may come next, in their order.
    pub(crate) fn allowed(&mut self, candidates: &[(u32, f32)]) -> Vec<(u32, f32)> {
        let there = candidates.iter().filter(|(id, _)| *id < self.vocab.len());
        let mut array = array_of(&mut self.data, there, false);
        // SAFETY: the array is ours; a grammar changes logits in place. Ids are in the vocabulary.
        unsafe { sys::llama_sampler_apply(self.ptr.as_ptr(), &raw mut array) };
        let finite = self.data.iter().filter(|it| it.logit.is_finite());
        let pairs = finite.map(|it| (it.id.cast_unsigned(), it.logit));
        pairs.filter(|(id, _)| self.is_said(*id)).collect()
    }

    /// The grammar takes a control token for its name, which nobody would see in the text.
    fn is_said(&self, id: u32) -> bool {
        let mut piece = Vec::new();
        self.vocab.piece(id, false, &mut piece);
        !piece.is_empty() || self.vocab.is_eog(id)
    }

    /// Goes on with `id`, which must be among the allowed ones: llama.cpp throws at any other.
    pub(crate) fn accept(&mut self, id: u32) {
        // SAFETY: the sampler lives; the caller's promise.
        unsafe { sys::llama_sampler_accept(self.ptr.as_ptr(), id.cast_signed()) };
    }
}

impl Drop for GrammarState {
    fn drop(&mut self) {
        // SAFETY: ours.
        unsafe { sys::llama_sampler_free(self.ptr.as_ptr()) };
    }
}

/// Candidates as llama.cpp's samplers take them, in `data`, which must stay as it is while they are at work.
fn array_of<'c>(
    data: &mut Vec<sys::llama_token_data>,
    candidates: impl Iterator<Item = &'c (u32, f32)>,
    sorted: bool,
) -> sys::llama_token_data_array {
    data.clear();
    data.extend(candidates.map(|&(id, logit)| sys::llama_token_data {
        id: id.cast_signed(),
        logit,
        p: 0.0,
    }));
    sys::llama_token_data_array {
        data: data.as_mut_ptr(),
        size: data.len(),
        selected: -1,
        sorted,
    }
}
