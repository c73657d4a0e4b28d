//! Prompts of a wanted length that no server has seen: words drawn from a seed.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// All of one length, so that a tokenizer of bytes gives the same number of tokens for each.
const WORDS: [&str; 48] = [
    "moon", "tree", "lake", "bird", "road", "king", "fire", "rain", "wolf", "door", "ship", "hill",
    "snow", "gold", "rose", "bear", "wind", "star", "lamp", "boat", "farm", "milk", "song", "girl",
    "hand", "barn", "fish", "leaf", "corn", "duck", "rock", "cake", "bell", "nest", "lion", "town",
    "coat", "pond", "sand", "bean", "goat", "kite", "vine", "crow", "drum", "frog", "iron", "plum",
];

/// Draws prompts.
pub struct Words {
    rng: StdRng,
    /// Tokens of a word, as the server counts them.
    per_word: f64,
}

impl Words {
    /// Of a seed, before anything is known of the tokenizer.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            per_word: 1.0,
        }
    }

    /// Others of the same kind, for somebody who asks at the same time.
    pub fn apart(&mut self) -> Self {
        Self {
            rng: StdRng::seed_from_u64(self.rng.next_u64()),
            per_word: self.per_word,
        }
    }

    /// Notes that a text of so many words has so many tokens.
    pub fn learn(&mut self, words: usize, tokens: u64) {
        if words > 0 && tokens > 0 {
            self.per_word = tokens as f64 / words as f64;
        }
    }

    /// A text of about `tokens` tokens, rather fewer than more.
    pub fn tokens(&mut self, tokens: u32) -> String {
        let words = (f64::from(tokens) / self.per_word).floor();
        self.words((words as usize).max(1))
    }

    /// A text of so many words.
    pub fn words(&mut self, n: usize) -> String {
        let word = |_| *WORDS.choose(&mut self.rng).unwrap_or(&WORDS[0]);
        let words: Vec<&str> = (0..n).map(word).collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::{WORDS, Words};

    #[test]
    fn prompts_have_the_wanted_length_and_are_new() {
        assert!(WORDS.iter().all(|word| word.len() == 4));
        let mut words = Words::new(7);
        // A tokenizer of bytes: a word, and the space before the next one.
        words.learn(10, 50);
        let (one, two) = (words.tokens(1000), words.tokens(1000));
        assert_eq!(one.len(), 999);
        assert_ne!(one, two, "a second prompt is another one");
        assert_ne!(words.apart().tokens(1000), words.apart().tokens(1000));
        assert_eq!(Words::new(7).words(9), Words::new(7).words(9), "of a seed");
        assert_eq!(words.tokens(0).split(' ').count(), 1);
    }
}
