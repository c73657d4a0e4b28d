//! `shoal run`: one prompt, one answer, streamed. Over the swarm, or (`--local`) with the whole model
//! in this process: the reference, in the same chunks, so that both print the same at `--temp 0`. While it
//! runs over the swarm a journal is kept, from which `--resume` goes on.

use std::time::{Duration, Instant};

use engine::{Message, Vocab};
use node::answer::{Answer, Stop, Words};

use crate::answer::{self, Question};
use crate::failure::Failure;
use crate::generation::Generation;
use crate::interrupt::Interrupt;
use crate::journal::{self, Asked, Journal};
use crate::opening::{Opening, Ready, Room};
use crate::run_report::{
    FellBack, Hop, Line, Privacy, Recovery, Resumed, RunReport, Timings, recoveries_line,
    route_line,
};
use crate::session_args::SessionArgs;
use crate::swarm::Swarm;
use crate::{figures, local_models, prompt, terminal, tokens};

/// Ask a model and stream its answer.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal run \"Why is the sea salt?\"
  shoal run -m llama-1b --temp 0 -n 64 \"Once upon a time\"
  shoal run --system \"Answer in one sentence.\" \"What is a shoal?\"
  git diff | shoal run --system \"Write a commit message.\" -
  shoal run --local demo --raw \"Once upon a time\"
  shoal run --json \"Hello\" | jq '{text, route, tokens_per_s}'
  shoal run --json-lines \"Hello\" | jq -c 'select(.event == \"token\") | [.at_ms, .text]'
  shoal run --privacy trusted --peer /ip4/10.0.0.2/tcp/4001/p2p/12D3KooW... \"Hello\"
  shoal run --local-fallback llama-1b.gguf --wait 10 \"Tell me a long story.\"
  shoal run --resume                  go on with the answer that was interrupted last
  shoal run --resume --list           what can be resumed

The answer goes to stdout, everything about it to stderr. Ctrl-C frees the session on every hop.

While an answer runs over the swarm, its prompt and tokens lie in HOME/journal, readable by you alone; they are
removed when it ends. After a kill, a power cut, an error or Ctrl-C they stay, the last 16 for a week, and
--resume prints what was there and goes on: with the same settings and the same dice, so with the same text as
if nothing had happened. It needs the same --swarm, --peer and --allow. --no-journal keeps nothing.")]
pub struct Args {
    /// The prompt; read from stdin when absent or `-`.
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,

    /// The model: a name, the beginning of an id, or a GGUF file [default: the only one there is, else demo].
    #[arg(short, long, env = "SHOAL_MODEL", value_name = "NAME|ID|FILE")]
    model: Option<String>,

    /// Run the whole model in this process.
    #[arg(long, value_name = "NAME|FILE", num_args = 0..=1, default_missing_value = "", conflicts_with = "local_fallback")]
    local: Option<String>,

    /// Go on with an interrupted answer, the last one or this, with everything it was asked with.
    #[arg(long, value_name = "ID", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ASKED_ALREADY)]
    resume: Option<String>,

    /// With --resume: only list the answers that were interrupted.
    #[arg(long, requires = "resume")]
    list: bool,

    /// Keep no journal of the answer, so that it cannot be resumed.
    #[arg(long)]
    no_journal: bool,

    /// With --local and --local-fallback: load the model's files without checking first that they are what was
    /// imported.
    #[arg(long)]
    no_verify: bool,

    /// A system message, for models with a chat template.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "tokens"])]
    system: Option<String>,

    /// Give the prompt to the model as it is, without its chat template.
    #[arg(long)]
    raw: bool,

    /// The prompt is token ids and so is the answer, for models without a tokenizer.
    #[arg(long)]
    tokens: bool,

    /// Compute threads of --local and --local-fallback [default: physical cores; 1 for a small model].
    #[arg(long, env = "SHOAL_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    threads: Option<u32>,

    /// Print one JSON object: text, route, timings.
    #[arg(long)]
    json: bool,

    /// Print a JSON object a line as it goes on: the route, each token, at the end what --json prints.
    #[arg(long, conflicts_with = "json")]
    json_lines: bool,

    #[command(flatten)]
    session: SessionArgs,

    #[command(flatten)]
    generation: Generation,

    #[command(flatten)]
    swarm: Swarm,
}

/// What the journal of an interrupted answer says already.
const ASKED_ALREADY: [&str; 14] = [
    "prompt",
    "local",
    "system",
    "raw",
    "tokens",
    "no_journal",
    "max_tokens",
    "temp",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "ctx",
];

/// Asks, streams, reports.
pub fn main(args: Args) -> anyhow::Result<()> {
    if args.tokens && !args.generation.stop.is_empty() {
        return Err(Failure::usage("--stop is text, and with --tokens there is none").into());
    }
    if args.list {
        return list(&args);
    }
    ::node::runtime::run(run(args))?
}

/// What is asked, as typed or as a journal has it.
struct Typed {
    text: String,
    ids: Option<Vec<u32>>,
    journal: Option<Journal>,
}

/// When what was ready, for the report.
struct Times {
    begun: Instant,
    connect: Duration,
    open: Duration,
}

async fn run(mut args: Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    // Before Ctrl-C is ours: while a prompt is typed it ends the process as anywhere.
    let mut typed = args.typed()?;
    let interrupt = Interrupt::listen();
    let opened = args.make_ready(&typed, &interrupt);
    let (mut ready, prompt) = interrupt.or_end(opened).await?;
    args.say_route(&ready);
    let seed = args.generation.seed();
    if typed.journal.is_none() && !args.no_journal {
        typed.journal = args.begin_journal(&ready, &typed.text, &prompt, seed);
    }
    let journal = typed.journal.as_mut();
    let answer = args
        .ask(&mut ready, &prompt, seed, &interrupt, journal)
        .await;
    // Said at once, before notes; who does not read it is told of when everything is closed.
    let said = match &answer {
        Ok(_) if !args.for_programs() => terminal::stream("\n"),
        _ => Ok(()),
    };
    let times = Times {
        begun,
        connect: ready.connect,
        open: ready.open,
    };
    let mut report = args.report(&ready, prompt.len(), seed, typed.journal.as_ref());
    ready.source.close().await;
    if let Some(member) = ready.member {
        member.leave().await;
    }
    if let Some(journal) = typed.journal {
        let ended = answer.as_ref().is_ok_and(|it| it.stop != Stop::Interrupted);
        keep_or_end(journal, ended);
    }
    let answer = answer?;
    said?;
    say_end(
        &answer,
        report.n_ctx,
        &report.recoveries,
        !args.for_programs(),
    );
    let stop = answer.stop;
    report.add(answer, &times);
    if args.json_lines {
        terminal::say_json_line(&Line::End(&report))?;
    } else if args.json {
        terminal::say_json(&report)?;
    }
    match stop {
        Stop::Interrupted => Err(Failure::interrupted().into()),
        _ => Ok(()),
    }
}

impl RunReport {
    fn add(&mut self, answer: Answer, times: &Times) {
        self.tokens_per_s = answer.tokens_per_s();
        self.stop = answer.stop.name().into();
        self.text = answer.text;
        self.generated_tokens = answer.tokens.len();
        self.tokens = answer.tokens;
        self.timings = Timings {
            connect_ms: ms(times.connect),
            open_ms: ms(times.open),
            prompt_ms: ms(answer.to_first),
            decode_ms: ms(answer.decode),
            total_ms: ms(times.begun.elapsed()),
        };
        self.ttft_ms = self.timings.prompt_ms;
    }
}

/// A journal is gone with the answer that ended; another's is kept, which the user should know.
fn keep_or_end(journal: Journal, ended: bool) {
    if ended {
        journal.end();
    } else {
        let id = &journal.id;
        terminal::note(format!("interrupted; `shoal run --resume {id}` goes on"));
    }
}

/// Roughly: nobody counts the seconds of a day.
fn age(s: u64) -> String {
    match s {
        ..120 => format!("{s} s"),
        120..7_200 => format!("{} min", s / 60),
        7_200..172_800 => format!("{} h", s / 3_600),
        _ => format!("{} days", s / 86_400),
    }
}

/// What can be resumed.
fn list(args: &Args) -> anyhow::Result<()> {
    let home = args.swarm.home()?;
    let interrupted = journal::interrupted(&home);
    if args.json {
        return terminal::say_json(&serde_json::json!({ "interrupted": interrupted }));
    }
    if args.json_lines {
        return interrupted.iter().try_for_each(terminal::say_json_line);
    }
    if interrupted.is_empty() {
        terminal::note("no answer was interrupted");
        return Ok(());
    }
    for it in interrupted {
        let age = age(it.age_s);
        terminal::say(format!(
            "{}  {} of {} tokens, {age} ago, {} in swarm {}: {}",
            it.id,
            it.tokens,
            it.max_tokens,
            figures::printable(&it.model, 40),
            figures::printable(&it.swarm, 40),
            figures::printable(&it.title, Asked::TITLE_CHARS_MAX),
        ))?;
    }
    terminal::note(format!("in {}", journal::folder(&home).display()));
    Ok(())
}

/// What the user should know about how it ended; the figures only where someone watches.
fn say_end(answer: &Answer, n_ctx: u32, recoveries: &[Recovery], figures_too: bool) {
    if let Some(note) = recoveries_line(recoveries) {
        terminal::note(note);
    }
    if answer.stop == Stop::ContextFull {
        terminal::warn(format!(
            "the context is full ({n_ctx} tokens), so the answer ends here; --ctx N makes room where the model allows it"
        ));
    }
    if figures_too && terminal::stderr_is_terminal() {
        terminal::note(format!(
            "{} · {} tokens/s · first after {}",
            figures::plural(answer.tokens.len(), "token"),
            figures::rate(Some(answer.tokens_per_s())),
            figures::duration(answer.to_first),
        ));
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

impl Args {
    /// The prompt, and its ids where it is token ids. Mistakes in it are said before anything is dialled or loaded.
    fn read_prompt(&self) -> anyhow::Result<(String, Option<Vec<u32>>)> {
        let text = prompt::read(self.prompt.as_deref())?;
        let ids = if self.tokens {
            Some(tokens::not_empty(prompt::token_ids(&text)?)?)
        } else {
            None
        };
        if text.trim().is_empty() && !self.raw {
            return Err(tokens::nothing_asked()
                .try_this(
                    "`shoal run \"Once upon a time\"`; with --raw a model may begin by itself",
                )
                .into());
        }
        Ok((text, ids))
    }

    /// Whether the answer is not for people.
    fn for_programs(&self) -> bool {
        self.json || self.json_lines
    }

    fn privacy(&self) -> Privacy {
        if self.local.is_some() {
            Privacy::Local
        } else {
            self.session.privacy.unwrap_or(Privacy::Open)
        }
    }

    /// The prompt, from wherever it comes.
    fn typed(&mut self) -> anyhow::Result<Typed> {
        if let Some(id) = self.resume.as_deref() {
            let home = self.swarm.home()?;
            let journal = Journal::resume(&home, (!id.is_empty()).then_some(id))?;
            self.take_over(&journal.asked)?;
            return Ok(Typed {
                text: String::new(),
                ids: Some(journal.asked.prompt.clone()),
                journal: Some(journal),
            });
        }
        let (text, ids) = self.read_prompt()?;
        Ok(Typed {
            text,
            ids,
            journal: None,
        })
    }

    /// Everything that was asked for before; a prompt does not go to another swarm, nor to more eyes.
    fn take_over(&mut self, asked: &Asked) -> anyhow::Result<()> {
        let privacy = self.privacy().max(asked.privacy);
        let swarm = self
            .swarm
            .settings(privacy == Privacy::Trusted)?
            .swarm
            .to_string();
        if swarm != asked.swarm && privacy != Privacy::Local {
            let there = figures::printable(&asked.swarm, 80);
            return Err(
                Failure::new(format!("that was asked in swarm {there}, not in {swarm}"))
                    .try_this(format!("--swarm {there}, with the same --peer"))
                    .into(),
            );
        }
        self.session.privacy = Some(privacy);
        self.session.travel.wire = asked.wire.parse()?;
        self.generation = asked.generation.clone();
        self.model = Some(asked.model_id.clone());
        self.tokens = asked.as_ids;
        Ok(())
    }

    fn say_route(&self, ready: &Ready) {
        let route = Hop::all(&ready.source.route());
        let standbys = Hop::all(&ready.source.standbys());
        let wire = self.session.travel.wire.to_string();
        terminal::note(route_line(&route, &standbys, ready.privacy, &wire));
        if self.resume.is_some() && ready.privacy == Privacy::Local {
            terminal::note("the peers of the interrupted run could read the prompt");
        }
    }

    /// What there is to say besides the answer.
    fn report(
        &self,
        ready: &Ready,
        prompt_tokens: usize,
        seed: u32,
        journal: Option<&Journal>,
    ) -> RunReport {
        let source = &ready.source;
        let said = journal.map_or(0, |journal| journal.said.len());
        // Whoever could read the prompt before still can.
        let before = journal.map_or(ready.privacy, |journal| journal.asked.privacy);
        let privacy = ready.privacy.min(before);
        let fell_back = source
            .left()
            .map(|left| FellBack::new(left, prompt_tokens, said));
        let resumed = self.resume.as_ref().and(journal).map(|journal| Resumed {
            id: journal.id.clone(),
            tokens: said,
        });
        RunReport {
            model: ready.model.clone(),
            model_id: ready.model_id.clone(),
            prompt_tokens,
            n_ctx: source.n_ctx(),
            hops: source.route().len(),
            route: Hop::all(&source.route()),
            standbys: Hop::all(&source.standbys()),
            recoveries: source.recoveries().iter().map(Into::into).collect(),
            fell_back,
            resumed,
            privacy,
            peers_can_read_prompt: privacy != Privacy::Local,
            wire: self.session.travel.wire.to_string(),
            seed,
            ..RunReport::default()
        }
    }

    /// What a resumed run needs to know; nothing where this process computes, or where it cannot be written.
    fn begin_journal(
        &self,
        ready: &Ready,
        text: &str,
        prompt: &[u32],
        seed: u32,
    ) -> Option<Journal> {
        let member = ready.member.as_ref()?;
        let asked = Asked {
            version: journal::VERSION,
            swarm: member.settings.swarm.to_string(),
            model: ready.model.clone(),
            model_id: ready.model_id.clone()?,
            title: figures::printable(text, Asked::TITLE_CHARS_MAX),
            as_ids: self.tokens,
            privacy: ready.privacy,
            wire: self.session.travel.wire.to_string(),
            generation: Generation {
                seed: Some(seed),
                ctx: Some(ready.source.n_ctx()),
                ..self.generation.clone()
            },
            prompt: prompt.to_vec(),
        };
        let begun = Journal::begin(&member.settings.home, asked);
        begun
            .inspect_err(|error| {
                terminal::warn(format!(
                    "no journal ({error}): this answer cannot be resumed"
                ));
            })
            .ok()
    }

    /// The answer, streamed unless it goes into JSON.
    async fn ask(
        &self,
        ready: &mut Ready,
        prompt: &[u32],
        seed: u32,
        interrupt: &Interrupt,
        journal: Option<&mut Journal>,
    ) -> anyhow::Result<Answer> {
        let words = match &ready.vocab {
            Some(vocab) if !self.tokens => Words::Text(vocab),
            other => Words::Ids(other.as_ref()),
        };
        let source = &mut ready.source;
        let mut sampler = answer::sampler(&self.generation, seed, source.n_vocab())?;
        if self.json_lines {
            let route = Hop::all(&source.route());
            terminal::say_json_line(&Line::Route { route: &route })?;
        }
        let begun = Instant::now();
        let show = |token: Option<u32>, text: &str| {
            if self.json_lines && (token.is_some() || !text.is_empty()) {
                let at_ms = ms(begun.elapsed());
                terminal::say_json_line(&Line::Token { token, text, at_ms })?;
            } else if !self.for_programs() && !text.is_empty() {
                terminal::stream(text)?;
            }
            Ok(())
        };
        let question = Question {
            prompt,
            words,
            generation: &self.generation,
            cancel: interrupt,
            journal,
        };
        answer::generate(source, &mut sampler, question, show).await
    }

    /// The model and the prompt's tokens.
    async fn make_ready(
        &self,
        typed: &Typed,
        interrupt: &Interrupt,
    ) -> anyhow::Result<(Ready, Vec<u32>)> {
        let opening = Opening {
            swarm: &self.swarm,
            model: self.model.as_deref(),
            session: &self.session,
            threads: self.threads,
            verify: !self.no_verify,
            interrupt,
        };
        let mut prompt = Vec::new();
        let room = |vocab: Option<&Vocab>, limit| {
            prompt = self.prompt_tokens(&typed.text, typed.ids.clone(), vocab)?;
            Ok(self.generation.n_ctx(prompt.len(), limit)?)
        };
        let ready = if self.privacy() == Privacy::Local {
            tokio::task::block_in_place(|| self.load(&opening, room))?
        } else {
            opening.over_swarm(room).await?
        };
        Ok((ready, prompt))
    }

    /// The whole model in this process.
    fn load(&self, opening: &Opening<'_>, room: impl Room) -> anyhow::Result<Ready> {
        let settings = self.swarm.settings(false)?;
        let named = self.local.as_deref().filter(|name| !name.is_empty());
        let model = named
            .or(self.model.as_deref())
            .or(settings.file.first_model())
            .unwrap_or(local_models::DEMO);
        let file = local_models::whole_file(&settings.home, model)
            .map_err(|error| self.meant_as_prompt(error))?;
        opening.here(model, &file, room)
    }

    /// `shoal run --local "Once upon a time"` reads the prompt as a model's name.
    fn meant_as_prompt(&self, error: anyhow::Error) -> anyhow::Error {
        match (&self.local, &self.prompt) {
            (Some(name), None) if name.contains(char::is_whitespace) => {
                Failure::new(error.to_string())
                    .try_this("if that is the prompt: `shoal run --local demo \"...\"`")
                    .into()
            }
            _ => error,
        }
    }

    fn prompt_tokens(
        &self,
        text: &str,
        ids: Option<Vec<u32>>,
        vocab: Option<&Vocab>,
    ) -> anyhow::Result<Vec<u32>> {
        if let Some(ids) = ids {
            return Ok(ids);
        }
        let vocab = vocab.ok_or_else(tokens::no_tokenizer)?;
        match vocab.chat_template() {
            Some(template) if !self.raw => {
                let system = self
                    .system
                    .iter()
                    .map(|text| Message::new("system", text.as_str()));
                let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
                tokens::of_chat(vocab, template, &messages)
            }
            None if self.system.is_some() => Err(Failure::usage(
                "this model has no chat template, so a system message has no place in it",
            )
            .try_this("put it into the prompt")
            .into()),
            _ => tokens::of_text(vocab, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// `shoal run --resume` with these flags, for what was asked with `privacy` in swarm `home`.
    fn resumed(privacy: Privacy, flags: &[&str]) -> anyhow::Result<Args> {
        let home = tempfile::tempdir()?;
        let dir = home.path().to_string_lossy();
        let fixed = ["run", "--resume", "--home", &dir, "--mdns", "off"];
        let mut args = Line::try_parse_from(fixed.iter().chain(flags))?.args;
        let asked = Asked {
            version: journal::VERSION,
            swarm: "home".into(),
            model: "demo".into(),
            model_id: "ab".repeat(32),
            title: String::new(),
            as_ids: true,
            privacy,
            wire: "q8_0".into(),
            generation: Generation {
                seed: Some(7),
                ..args.generation.clone()
            },
            prompt: vec![1],
        };
        args.take_over(&asked)?;
        Ok(args)
    }

    const PEER: &str =
        "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";

    #[test]
    fn a_prompt_that_was_trusted_stays_so() {
        let open = ["--swarm", "home", "--privacy", "open"];
        let error = resumed(Privacy::Trusted, &open).err().unwrap();
        assert!(error.to_string().contains("trusted"), "{error}");
        let listed = [&open[..], &["--peer", PEER]].concat();
        let args = resumed(Privacy::Trusted, &listed).unwrap();
        assert!(args.session.trusted());
        // Stricter than it was is the user's to choose.
        let args = resumed(Privacy::Open, &["--privacy", "local"]).unwrap();
        assert_eq!(args.privacy(), Privacy::Local);
        assert!(resumed(Privacy::Open, &["--swarm", "another"]).is_err());
    }

    #[test]
    fn what_was_asked_is_asked_again() {
        let args = resumed(Privacy::Open, &["--swarm", "home"]).unwrap();
        assert_eq!(args.generation.seed, Some(7));
        assert_eq!(args.session.travel.wire.to_string(), "q8_0");
        assert_eq!(args.model, Some("ab".repeat(32)));
        assert!(args.tokens && args.privacy() == Privacy::Open);
        for flags in [
            &["--temp", "0"][..],
            &["--raw"],
            &["--seed", "1"],
            &["-n", "9"],
        ] {
            assert!(resumed(Privacy::Open, flags).is_err(), "{flags:?}");
        }
    }
}
