//! A swarm without a free place, with real processes: clients wait their turn, say so once, and give up when told.

use anyhow::{Context, Result, bail, ensure};
use testnet::swarm::Swarm;
use tests::{PATIENCE, serve};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr};
use tokio::time::timeout;

/// Memory of each node: its four layers and few sessions.
const NARROW: &str = "6M";

/// Sessions that certainly do not fit into it.
const OCCUPANTS_MAX: usize = 16;

/// Clients that ask while there is no place.
const CLIENTS: usize = 8;

/// A client's standard error, line by line.
type Said = Lines<BufReader<ChildStderr>>;

/// Starts `shoal run` or `shoal chat` in a home of its own.
fn start(swarm: &Swarm, name: &str, verb: &str, more: &[&str]) -> Result<(Child, Said)> {
    let client = swarm.client(name);
    let mut args = vec![verb.to_owned()];
    args.extend(client.swarm_args());
    args.extend(["--model", "demo", "--temp", "0", "-n", "2", "--ctx", "256"].map(str::to_owned));
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    let mut child = client.start(&args)?;
    let said = BufReader::new(child.stderr.take().context("no stderr")?).lines();
    Ok((child, said))
}

fn ask(swarm: &Swarm, name: &str, wait: &str) -> Result<(Child, Said)> {
    start(swarm, name, "run", &["--raw", "--wait", wait, "Once"])
}

/// Reads on until a line contains `words`.
async fn hear(said: &mut Said, words: &str) -> Result<()> {
    let heard = async {
        let mut before = Vec::new();
        while let Some(line) = said.next_line().await? {
            if line.contains(words) {
                return Ok(());
            }
            before.push(line);
        }
        bail!("it ended without {words:?}: {before:?}")
    };
    timeout(PATIENCE, heard).await?
}

/// Waits for the end; gives what was said until then and whether it succeeded.
async fn end((mut child, mut said): (Child, Said)) -> Result<(bool, String)> {
    let ended = async {
        let mut all = String::new();
        while let Some(line) = said.next_line().await? {
            all += &line;
            all.push('\n');
        }
        Ok((child.wait().await?.success(), all))
    };
    timeout(PATIENCE, ended).await?
}

#[tokio::test]
async fn clients_wait_for_a_place_or_fail_at_once_as_told() -> Result<()> {
    let mut swarm = serve("demo", &["0..4", "4..8"], &["--memory", NARROW]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    // Chats keep their sessions while they wait for a line that never comes.
    let mut occupants = Vec::new();
    let said = loop {
        let (served, said) = end(ask(&swarm, "hasty", "0")?).await?;
        if !served {
            break said;
        }
        ensure!(occupants.len() < OCCUPANTS_MAX, "there is always room");
        let (chat, mut said) = start(&swarm, "occupant", "chat", &[])?;
        hear(&mut said, "route: ").await?;
        occupants.push((chat, said));
    };
    ensure!(
        said.contains("every holder of layers") && said.contains("is busy"),
        "{said}"
    );
    ensure!(!said.contains("waiting up to"), "it waited: {said}");

    let mut first = ask(&swarm, "first", "100")?;
    hear(&mut first.1, "waiting up to 100 s (Ctrl-C to stop)").await?;
    let others = (0..CLIENTS).map(|n| ask(&swarm, &format!("client-{n}"), "100"));
    let others = others.collect::<Result<Vec<_>>>()?;
    drop(occupants);
    for client in others.into_iter().chain([first]) {
        let (served, said) = end(client).await?;
        ensure!(served, "{said}");
        ensure!(said.matches("waiting up to").count() <= 1, "{said}");
    }
    swarm.stop().await;
    Ok(())
}
