//! Which model is meant when the user says a name, a part of an id, or nothing. Pure.

use swarm_proto::ModelId;

use crate::failure::Failure;
use crate::figures;
use crate::swarm_report::ModelReport;

/// Picks among the models a swarm serves. `alias` is what this machine's store knows the name as: it
/// is the user's own word and comes before the names that peers use.
pub fn choose(
    asked: Option<&str>,
    alias: Option<ModelId>,
    served: &[ModelReport],
) -> Result<ModelId, Failure> {
    let Some(asked) = asked else {
        return choose_default(served);
    };
    if let Some(id) = alias {
        return Ok(id);
    }
    let by_name: Vec<&ModelReport> = served.iter().filter(|model| model.name == asked).collect();
    let by_id: Vec<&ModelReport> = served
        .iter()
        .filter(|model| model.id.begins_with(asked))
        .collect();
    let meant = if by_name.is_empty() { by_id } else { by_name };
    match &meant[..] {
        [one] => Ok(one.id),
        [] => Err(unknown(asked, served)),
        many => {
            let ids: Vec<&str> = many
                .iter()
                .map(|model| figures::short_hash(&model.model))
                .collect();
            Err(Failure::new(format!(
                "{} models here are called `{}`",
                many.len(),
                figures::printable(asked, 80)
            ))
            .try_this(format!("one of their ids: {}", ids.join(", "))))
        }
    }
}

/// The only one served; else the one that is called `demo`.
fn choose_default(served: &[ModelReport]) -> Result<ModelId, Failure> {
    let whole: Vec<&ModelReport> = served.iter().filter(|model| model.complete).collect();
    match (served, &whole[..]) {
        ([one], _) => Ok(one.id),
        (_, [one]) => Ok(one.id),
        ([], _) => Err(Failure::new("nobody in this swarm serves a model")
            .try_this("`shoal node --model NAME` on a machine of the swarm, or `shoal run --local demo \"...\"` without one")),
        _ => match served.iter().find(|model| model.name == "demo") {
            Some(demo) => Ok(demo.id),
            None => Err(Failure::new(format!("this swarm serves {}", names(served))).try_this("say which with --model NAME")),
        },
    }
}

fn unknown(asked: &str, served: &[ModelReport]) -> Failure {
    let asked = figures::printable(asked, 80);
    if served.is_empty() {
        return Failure::new(format!(
            "nobody in this swarm serves `{asked}`, or any other model"
        ))
        .try_this(format!(
            "`shoal node --model {asked}` on a machine that has it"
        ));
    }
    Failure::new(format!(
        "no model in this swarm is called `{asked}`; served are {}",
        names(served)
    ))
    .try_this("one of these, or `shoal status` to see who serves what")
}

fn names(served: &[ModelReport]) -> String {
    let names: Vec<&str> = served
        .iter()
        .map(|model| {
            if model.name.is_empty() {
                figures::short_hash(&model.model)
            } else {
                model.name.as_str()
            }
        })
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm_report::SwarmReport;
    use swarm_proto::{Advert, Hash, LayerRange, ModelAdvert, Peer};

    fn served(models: &[(u8, &str, u16)]) -> Vec<ModelReport> {
        let models = models
            .iter()
            .map(|&(id, name, held)| ModelAdvert {
                model: ModelId(Hash([id; 32])),
                name: name.into(),
                n_layer: 4,
                live: vec![LayerRange {
                    start: 0,
                    end: held,
                }],
                intended: Vec::new(),
                layer_tokens_s: None,
                n_ctx_max: 512,
                free_cells: 512,
                n_embd: 64,
                numerics: 0,
                stored: Vec::new(),
                layer_bytes_max: None,
                experts: None,
            })
            .collect();
        let advert = Advert {
            peer: Peer([7; 32]),
            seq: 1,
            ttl_ms: 30_000,
            addrs: Vec::new(),
            models,
            uplink_bytes_s: None,
            queue: 0,
            rtts: Vec::new(),
            leaving: false,
            agent: String::new(),
        };
        SwarmReport::new("test".into(), &[advert], 1).models
    }

    fn id(n: u8) -> ModelId {
        ModelId(Hash([n; 32]))
    }

    #[test]
    fn without_a_name_the_only_one_or_the_demo() {
        assert_eq!(choose(None, None, &served(&[(1, "a", 4)])).unwrap(), id(1));
        assert_eq!(
            choose(None, None, &served(&[(1, "a", 4), (2, "b", 3)])).unwrap(),
            id(1),
            "only one is whole"
        );
        assert_eq!(
            choose(None, None, &served(&[(1, "a", 4), (2, "demo", 4)])).unwrap(),
            id(2)
        );
        let error = choose(None, None, &served(&[(1, "a", 4), (2, "b", 4)])).unwrap_err();
        assert!(error.to_string().contains("a, b"), "{error}");
        assert!(choose(None, None, &[]).is_err());
    }

    #[test]
    fn a_name_an_id_or_the_users_own_alias() {
        let both = served(&[(0xaa, "same", 4), (0xbb, "same", 4), (0xcc, "other", 4)]);
        assert_eq!(choose(Some("other"), None, &both).unwrap(), id(0xcc));
        assert_eq!(choose(Some("AAaaaa"), None, &both).unwrap(), id(0xaa));
        assert_eq!(
            choose(Some("same"), Some(id(0xbb)), &both).unwrap(),
            id(0xbb)
        );
        assert!(
            choose(Some("same"), None, &both)
                .unwrap_err()
                .to_string()
                .contains("2 models")
        );
        let error = choose(Some("nosuch"), None, &both).unwrap_err();
        assert!(
            error.to_string().contains("served are") && error.to_string().contains("other"),
            "{error}"
        );
    }
}
