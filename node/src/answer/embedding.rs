//! One vector of a text: the rows that the model's pooling counts, their mean, brought to length 1. Over the swarm
//! and in this process alike.

use engine::{PREFILL_CHUNK, Pool, Pooling, Want as Output};
use swarm_proto::{Form, Want, WantRows};

use super::cancel::Cancel;
use super::source::{Kind, Source, SourceError};
use crate::recovery::Session;

impl Source {
    /// The vector of `tokens`, which are fed from the beginning: what was held is forgotten. They go in frames of
    /// [`PREFILL_CHUNK`], as any prompt.
    ///
    /// # Errors
    /// See [`SourceError`].
    pub async fn embed(
        &mut self,
        tokens: &[u32],
        pooling: Pooling,
        cancel: &Cancel,
    ) -> Result<Vec<f32>, SourceError> {
        self.truncate(0)?;
        // Attention looks back only: nothing that comes after the first frame changes its first row.
        let tokens = match pooling {
            Pooling::First => &tokens[..tokens.len().min(PREFILL_CHUNK as usize)],
            Pooling::Mean | Pooling::Last => tokens,
        };
        let pool = match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = cancel.wait() => Err(SourceError::Interrupted),
                pool = over_swarm(session, tokens, pooling) => pool,
            },
            Kind::Local(model, rows) => tokio::task::block_in_place(|| {
                let mut counted = Counted::new(pooling, tokens.len());
                for (pos, chunk) in (0..).step_by(PREFILL_CHUNK as usize).zip(frames(tokens)) {
                    if cancel.is_set() {
                        return Err(SourceError::Interrupted);
                    }
                    model.run(pos, chunk, Output::Normed, rows)?;
                    let width = rows.len() / chunk.len();
                    rows.chunks_exact(width.max(1))
                        .for_each(|row| counted.add(row));
                }
                Ok(counted.pool)
            }),
        };
        let pool = pool?;
        self.fed.push(tokens);
        Ok(pool.unit())
    }
}

fn frames(tokens: &[u32]) -> impl Iterator<Item = &[u32]> {
    tokens.chunks(PREFILL_CHUNK as usize)
}

async fn over_swarm(
    session: &mut Session,
    tokens: &[u32],
    pooling: Pooling,
) -> Result<Pool, SourceError> {
    let rows = match pooling {
        Pooling::Last => WantRows::Last,
        Pooling::Mean | Pooling::First => WantRows::All,
    };
    let form = Form::Normed;
    session.feed(tokens, Want { rows, form }).await?;
    let wanted = match pooling {
        Pooling::Last => 1,
        Pooling::Mean | Pooling::First => tokens.len(),
    };
    let mut counted = Counted::new(pooling, wanted);
    for _ in 0..wanted {
        let row = session.next_logits().await?;
        counted.add(&row.normed);
        session.recycle(row);
    }
    Ok(counted.pool)
}

/// Takes rows in order, and adds up those that count.
struct Counted {
    pooling: Pooling,
    left: usize,
    first: bool,
    pool: Pool,
}

impl Counted {
    /// `rows`: how many come.
    fn new(pooling: Pooling, rows: usize) -> Self {
        Self {
            pooling,
            left: rows,
            first: true,
            pool: Pool::default(),
        }
    }

    fn add(&mut self, row: &[f32]) {
        self.left = self.left.saturating_sub(1);
        let counts = match self.pooling {
            Pooling::Mean => true,
            Pooling::First => self.first,
            Pooling::Last => self.left == 0,
        };
        self.first = false;
        if counts {
            self.pool.add(row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_count_by_their_place() {
        let unit = |pooling| {
            let mut counted = Counted::new(pooling, 3);
            for row in [[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]] {
                counted.add(&row);
            }
            counted.pool.unit()
        };
        let near = |got: Vec<f32>, wanted: [f32; 2]| {
            let off = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-6, "{got:?}, not {wanted:?}");
        };
        near(unit(Pooling::First), [0.6, 0.8]);
        near(unit(Pooling::Last), [1.0, 0.0]);
        let length = (16.0f32 + 25.0).sqrt();
        near(unit(Pooling::Mean), [4.0 / length, 5.0 / length]);
    }
}
