//! `shoal run`: one prompt, one answer, streamed. Over the swarm, or (`--local`) with the whole model
//! in this process: the reference, in the same chunks, so that both print the same at `--temp 0`.

use std::time::{Duration, Instant};

use engine::{Message, Vocab, WholeModel};

use crate::answer::{self, Answer, Stop, Words};
use crate::failure::Failure;
use crate::generation::Generation;
use crate::interrupt::Interrupt;
use crate::run_report::{Line, Privacy, Recovery, RunReport, Timings, recoveries_line, route_line};
use crate::session_args::SessionArgs;
use crate::source::Source;
use crate::swarm::{Member, Swarm};
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

The answer goes to stdout, everything about it to stderr. Ctrl-C frees the session on every hop.")]
pub struct Args {
    /// The prompt; read from stdin when absent or `-`.
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,

    /// The model: a name, the beginning of an id, or a GGUF file [default: the only one there is, else demo].
    #[arg(short, long, env = "SHOAL_MODEL", value_name = "NAME|ID|FILE")]
    model: Option<String>,

    /// Run the whole model in this process.
    #[arg(long, value_name = "NAME|FILE", num_args = 0..=1, default_missing_value = "")]
    local: Option<String>,

    /// With --local: load the model's files without checking first that they are what was imported.
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

    /// Compute threads of --local [default: physical cores; 1 for a small model].
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

/// A model that is ready to take tokens, and what there is to say about it.
struct Ready {
    source: Source,
    prompt: Vec<u32>,
    vocab: Option<Vocab>,
    model: String,
    model_id: Option<String>,
    privacy: Privacy,
    /// The network of a session; it ends with it.
    member: Option<Member>,
    connect: Duration,
    open: Duration,
}

/// Asks, streams, reports.
pub fn main(args: Args) -> anyhow::Result<()> {
    if args.tokens && !args.generation.stop.is_empty() {
        return Err(Failure::usage("--stop is text, and with --tokens there is none").into());
    }
    ::node::runtime::run(run(args))?
}

async fn run(args: Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    // Before Ctrl-C is ours: while a prompt is typed it ends the process as anywhere.
    let (text, ids) = args.read_prompt()?;
    let interrupt = Interrupt::listen();
    let mut ready = interrupt
        .or_end(args.make_ready(&text, ids, &interrupt))
        .await?;
    let route = ready.source.route();
    let wire = args.session.wire.to_string();
    let standbys = ready.source.standbys();
    terminal::note(route_line(&route, &standbys, ready.privacy, &wire));
    let seed = args.generation.seed();
    let answer = args.ask(&mut ready, seed, &interrupt).await;
    let n_ctx = ready.source.n_ctx();
    let (route, standbys) = (ready.source.route(), ready.source.standbys());
    let recoveries: Vec<Recovery> = ready.source.recoveries().iter().map(Into::into).collect();
    ready.source.close().await;
    if let Some(member) = ready.member {
        member.leave().await;
    }
    let answer = answer?;
    let for_programs = args.json || args.json_lines;
    if !for_programs {
        terminal::stream("\n")?;
    }
    say_end(&answer, n_ctx, &recoveries, !for_programs);
    let stop = answer.stop;
    if for_programs {
        let timings = Timings {
            connect_ms: ms(ready.connect),
            open_ms: ms(ready.open),
            prompt_ms: ms(answer.to_first),
            decode_ms: ms(answer.decode),
            total_ms: ms(begun.elapsed()),
        };
        let report = RunReport {
            tokens_per_s: answer.tokens_per_s(),
            ttft_ms: timings.prompt_ms,
            text: answer.text,
            stop: stop.name().into(),
            model: ready.model,
            model_id: ready.model_id,
            prompt_tokens: ready.prompt.len(),
            generated_tokens: answer.tokens.len(),
            tokens: answer.tokens,
            n_ctx,
            timings,
            hops: route.len(),
            route,
            standbys,
            recoveries,
            privacy: ready.privacy,
            peers_can_read_prompt: ready.privacy != Privacy::Local,
            wire,
            seed,
        };
        if args.json_lines {
            terminal::say_json_line(&Line::End(&report))?;
        } else {
            terminal::say_json(&report)?;
        }
    }
    match stop {
        Stop::Interrupted => Err(Failure::interrupted().into()),
        _ => Ok(()),
    }
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

    fn privacy(&self) -> Privacy {
        if self.local.is_some() {
            Privacy::Local
        } else {
            self.session.privacy.unwrap_or(Privacy::Open)
        }
    }

    /// The answer, streamed unless it goes into JSON.
    async fn ask(
        &self,
        ready: &mut Ready,
        seed: u32,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Answer> {
        let words = match &ready.vocab {
            Some(vocab) if !self.tokens => Words::Text(vocab),
            other => Words::Ids(other.as_ref()),
        };
        let generation = &self.generation;
        let source = &mut ready.source;
        let mut sampler = answer::sampler(generation, seed, source.n_vocab())?;
        if self.json_lines {
            let route = source.route();
            terminal::say_json_line(&Line::Route { route: &route })?;
        }
        let begun = Instant::now();
        let show = |token: Option<u32>, text: &str| {
            if self.json_lines && (token.is_some() || !text.is_empty()) {
                let at_ms = ms(begun.elapsed());
                terminal::say_json_line(&Line::Token { token, text, at_ms })?;
            } else if !(self.json || self.json_lines || text.is_empty()) {
                terminal::stream(text)?;
            }
            Ok(())
        };
        answer::generate(
            source,
            &ready.prompt,
            &words,
            generation,
            &mut sampler,
            interrupt,
            show,
        )
        .await
    }

    async fn make_ready(
        &self,
        text: &str,
        ids: Option<Vec<u32>>,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Ready> {
        match self.privacy() {
            Privacy::Local => tokio::task::block_in_place(|| self.load(text, ids, interrupt)),
            privacy => self.open(text, ids, privacy == Privacy::Trusted).await,
        }
    }

    /// The whole model in this process.
    fn load(
        &self,
        text: &str,
        ids: Option<Vec<u32>>,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Ready> {
        let begun = Instant::now();
        let settings = self.swarm.settings(false)?;
        let named = self.local.as_deref().filter(|name| !name.is_empty());
        let model = named
            .or(self.model.as_deref())
            .or(settings.file.model.as_deref())
            .unwrap_or(local_models::DEMO);
        let file = local_models::whole_file(&settings.home, model)
            .map_err(|error| self.meant_as_prompt(error))?;
        let header = local_models::header_of_file(&file.path)?;
        let vocab = tokens::vocab(&header)?;
        let prompt = self.prompt_tokens(text, ids, vocab.as_ref())?;
        let n_ctx_train = header
            .get_str("general.architecture")
            .and_then(|arch| header.get_u32(&format!("{arch}.context_length")));
        let n_ctx = self.generation.n_ctx(prompt.len(), n_ctx_train?)?;
        if !self.no_verify {
            file.verify(interrupt)?;
        }
        let wheel = terminal::wheel(format!("loading {model}"));
        let threads = self
            .threads
            .or(settings.file.threads)
            .unwrap_or_else(|| local_models::threads_for(&file.path));
        let whole = WholeModel::load(&file.path, n_ctx, threads)?;
        drop(wheel);
        Ok(Ready {
            source: Source::local(whole, answer::top(&self.generation)),
            prompt,
            vocab,
            model: model.to_string(),
            model_id: file.id.map(|id| id.to_string()),
            privacy: Privacy::Local,
            member: None,
            connect: begun.elapsed(),
            open: Duration::ZERO,
        })
    }

    /// A session over the swarm.
    async fn open(
        &self,
        text: &str,
        ids: Option<Vec<u32>>,
        trusted: bool,
    ) -> anyhow::Result<Ready> {
        let begun = Instant::now();
        let member = self.swarm.join(trusted).await?;
        let model = member.model(self.model.as_deref()).await?;
        let prompt = self.prompt_tokens(text, ids, model.vocab.as_ref())?;
        let n_ctx = self.generation.n_ctx(prompt.len(), model.n_ctx_max)?;
        let connected = Instant::now();
        let session = member.open(&model, self.session.ask(n_ctx)).await?;
        Ok(Ready {
            source: Source::swarm(session, answer::top(&self.generation)),
            prompt,
            vocab: model.vocab,
            model: model.name,
            model_id: Some(model.id.to_string()),
            privacy: member.privacy(),
            member: Some(member),
            connect: connected - begun,
            open: connected.elapsed(),
        })
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
