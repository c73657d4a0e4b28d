//! How far rows that ran in company are from the same rows alone: what a fast session's text may differ by. Pure.

/// The greatest difference of a sample is not the greatest there is: others are taken for noise up to so many times
/// that.
const BEYOND: f32 = 2.0;

/// The batch noise of a model on one kind of machine: measured, not derived from its types.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchNoise {
    rows: u32,
    numbers: u64,
    greatest: f32,
    squares: f64,
}

impl BatchNoise {
    /// Adds logits that a row got alone, and those that it got in company.
    pub fn compare(&mut self, alone: &[f32], together: &[f32]) {
        self.rows += 1;
        for (a, b) in alone.iter().zip(together) {
            let off = (a - b).abs();
            self.numbers += 1;
            self.greatest = self.greatest.max(off);
            self.squares += f64::from(off).powi(2);
        }
    }

    /// Rows that were compared.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// The greatest difference between two logits; 0: they had the same bits.
    pub fn greatest(&self) -> f32 {
        self.greatest
    }

    /// The root of the mean square of the differences.
    pub fn rms(&self) -> f32 {
        (self.squares / self.numbers.max(1) as f64).sqrt() as f32
    }

    /// The greatest difference that is taken for noise: twice the greatest seen.
    pub fn limit(&self) -> f32 {
        self.greatest * BEYOND
    }

    /// Whether noise explains that another token was the likeliest in company, where two were `apart` alone.
    pub fn explains(&self, apart: f32) -> bool {
        // One may fall by the limit while the other rises by it.
        apart <= 2.0 * self.limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bits_are_no_noise_and_explain_nothing() {
        let mut noise = BatchNoise::default();
        assert_eq!((noise.rows(), noise.rms()), (0, 0.0));
        noise.compare(&[1.0, 2.0], &[1.0, 2.0]);
        assert_eq!((noise.rows(), noise.greatest(), noise.rms()), (1, 0.0, 0.0));
        assert!(!noise.explains(f32::MIN_POSITIVE));
        noise.compare(&[1.0, 2.0], &[1.0, 1.5]);
        assert_eq!(
            (noise.greatest(), noise.limit(), noise.rms()),
            (0.5, 1.0, 0.25)
        );
        assert!(noise.explains(2.0) && !noise.explains(2.1));
    }
}
