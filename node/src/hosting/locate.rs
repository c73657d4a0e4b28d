//! A model that is not here, by what peers say of it.

use std::time::Duration;

use shard_registry::{AliasName, UnknownModel};
use swarm_proto::ModelId;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    load::{self, Found, LoadError},
    net::{FetchError, Net},
    swarm_node::StartError,
    transfer::{Transfer, TransferError},
};

/// How long a model that is not here is looked for among peers: a swarm that starts together is there within it.
const LOCATE: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// Finds a model that is not here by what peers say, and has it described; it then has a name here, too.
/// `alone`: nobody is known who could say anything.
pub(crate) async fn locate(
    unknown: UnknownModel,
    transfer: &Transfer,
    net: &Net,
    alone: bool,
) -> Result<Found, StartError> {
    let not_here = |unknown| StartError::Load(LoadError::Unknown(unknown));
    let UnknownModel::Unknown { text, mut known } = unknown else {
        return Err(not_here(unknown));
    };
    let is_file = text.contains(std::path::is_separator) || text.ends_with(".gguf");
    if is_file || alone {
        return Err(not_here(UnknownModel::Unknown { text, known }));
    }
    tracing::info!(model = %text, "not here: looking for it among peers");
    let deadline = Instant::now() + LOCATE;
    let mut changes = net.adverts().changes();
    let id = loop {
        match meant(&text, net)? {
            Some(found) => break found,
            None if Instant::now() >= deadline => {
                let models = net.adverts().snapshot().models();
                known.extend(
                    models
                        .into_iter()
                        .map(|(id, _, name)| format!("{name} ({})", id.short())),
                );
                return Err(not_here(UnknownModel::Unknown { text, known }));
            }
            None => {
                let soon = deadline.min(Instant::now() + PAUSE);
                let _ = timeout_at(soon, changes.changed()).await;
            }
        }
    };
    // Who says to have it may go, and others may come.
    while let Err(error) = transfer.describe(id).await {
        let nobody = matches!(
            error,
            TransferError::Fetch(FetchError::NoHolder { .. } | FetchError::Open(_))
        );
        if !nobody || Instant::now() >= deadline {
            return Err(error.into());
        }
        sleep(PAUSE).await;
    }
    // What it is called where it comes from, if that is free here.
    let models = net.adverts().snapshot().models();
    let name = models.into_iter().find(|(other, ..)| *other == id);
    let store = transfer.store().clone();
    let found = tokio::task::spawn_blocking(move || {
        if let Some(name) = name.and_then(|(.., name)| name.parse::<AliasName>().ok())
            && store.alias(&name).is_none()
        {
            store.set_alias(&name, id)?;
        }
        load::described(&store, id)
    });
    Ok(found.await??)
}

/// The model of this id, whole, or of this name or beginning of an id among those that peers have.
fn meant(text: &str, net: &Net) -> Result<Option<ModelId>, StartError> {
    if let Ok(id) = text.parse() {
        return Ok(Some(id));
    }
    let models = net.adverts().snapshot().models().into_iter();
    let fits = models.filter(|(id, _, name)| *name == text || id.begins_with(text));
    let ids: Vec<ModelId> = fits.map(|(id, ..)| id).collect();
    match ids[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        // By a name nobody decides between two models.
        _ => Err(LoadError::Unknown(UnknownModel::ambiguous(text, &ids)).into()),
    }
}
