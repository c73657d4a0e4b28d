//! The tokens whose KV a session holds, and the frames they were fed in: the same rows give the same bits
//! when they are fed again in these frames (docs/decisions/0044). Pure.

use engine::PREFILL_CHUNK;

/// Tokens and where frames end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fed {
    tokens: Vec<u32>,
    ends: Vec<usize>,
}

impl Fed {
    /// A prompt in one go, then all but the last token of an answer one by one, as it grew: that one is
    /// fed next.
    pub fn answer(prompt: &[u32], said: &[u32]) -> Self {
        let mut fed = Self::default();
        fed.push(prompt);
        let all_but_last = said.len().saturating_sub(1);
        said[..all_but_last]
            .iter()
            .for_each(|token| fed.push(&[*token]));
        fed
    }

    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Appends what was fed at once.
    pub fn push(&mut self, tokens: &[u32]) {
        if !tokens.is_empty() {
            self.tokens.extend_from_slice(tokens);
            self.ends.push(self.tokens.len());
        }
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        let whole = self.ends.partition_point(|end| *end <= len);
        self.ends.truncate(whole);
        self.tokens.truncate(len);
        if self.ends.last().copied().unwrap_or(0) < self.tokens.len() {
            self.ends.push(self.tokens.len());
        }
    }

    /// The frames to feed it in again, each with its position: longer ones in the engine's chunks, single
    /// tokens in a row up to `batch` at once.
    pub fn frames(&self, batch: u16) -> Vec<(usize, &[u32])> {
        let mut frames: Vec<(usize, &[u32])> = Vec::new();
        // Whether the last frame may grow.
        let mut singles = false;
        let mut start = 0;
        for &end in &self.ends {
            let single = end - start == 1;
            match frames.last_mut() {
                Some((pos, frame))
                    if singles && single && frame.len() < usize::from(batch.max(1)) =>
                {
                    *frame = &self.tokens[*pos..end];
                }
                _ => {
                    let chunks = self.tokens[start..end].chunks(PREFILL_CHUNK as usize);
                    let at = (start..).step_by(PREFILL_CHUNK as usize);
                    frames.extend(at.zip(chunks));
                }
            }
            (singles, start) = (single, end);
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(fed: &Fed, batch: u16) -> Vec<usize> {
        let frames = fed.frames(batch);
        let mut next = 0;
        for (pos, frame) in &frames {
            assert_eq!(*pos, next);
            assert_eq!(*frame, &fed.tokens()[next..next + frame.len()]);
            next += frame.len();
        }
        assert_eq!(next, fed.tokens().len());
        frames.iter().map(|(_, frame)| frame.len()).collect()
    }

    #[test]
    fn a_prompt_goes_in_its_chunks_and_an_answer_in_batches() {
        let prompt: Vec<u32> = (0..65).collect();
        let fed = Fed::answer(&prompt, &[7; 6]);
        assert_eq!(lens(&fed, 16), [32, 32, 1, 5]);
        assert_eq!(lens(&fed, 2), [32, 32, 1, 2, 2, 1]);
        assert_eq!(lens(&fed, 1), [32, 32, 1, 1, 1, 1, 1, 1]);
        assert_eq!(lens(&Fed::answer(&prompt, &[]), 16), [32, 32, 1]);
        assert_eq!(lens(&Fed::default(), 16), [0; 0]);
    }

    #[test]
    fn a_second_turn_begins_a_frame_of_its_own() {
        let mut fed = Fed::answer(&[1, 2, 3], &[4, 5, 6]);
        fed.push(&[6, 7, 8]);
        fed.push(&[9]);
        assert_eq!(lens(&fed, 16), [3, 2, 3, 1]);
        fed.truncate(7);
        assert_eq!(lens(&fed, 16), [3, 2, 2]);
        fed.truncate(4);
        assert_eq!(lens(&fed, 16), [3, 1]);
        fed.truncate(0);
        assert_eq!(fed, Fed::default());
    }
}
