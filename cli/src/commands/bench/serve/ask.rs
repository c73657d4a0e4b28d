//! A server as any client sees it: one streamed answer over HTTP, and when each token of it came.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use ureq::Agent;

use crate::failure::Failure;

/// Between two words of a server: a long prompt is computed in that time, even on a slow machine.
const SILENCE: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest part of a stream, and longest answer to anything else.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Between two tries of somebody who was refused, whatever the server asks for.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Where to ask, and as whom. Clones share their connections.
#[derive(Clone)]
pub struct Server {
    agent: Agent,
    url: String,
    key: Option<String>,
    /// What the server calls the model.
    pub model: String,
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Goes on with a text.
    Text(String),
    /// Who said what, in turn, the user first.
    Chat(Vec<String>),
}

/// What came of it.
pub enum Reply {
    /// Tokens.
    Answer(Answer),
    /// The server is full: ask again after a while.
    Refused(Duration),
}

/// An answer, as it came.
#[derive(Debug)]
pub struct Answer {
    /// When it was asked for.
    pub asked: Instant,
    /// When each part with tokens came, and how many there were in it.
    pub parts: Vec<(Instant, usize)>,
    /// Tokens of the prompt, where the server said so.
    pub prompt_tokens: Option<u64>,
    /// What was said.
    pub text: String,
}

impl Answer {
    /// From the question to the first token.
    pub fn to_first(&self) -> Option<Duration> {
        let (first, _) = self.parts.first()?;
        Some(first.duration_since(self.asked))
    }

    /// Beginning and end of each wait for a further token.
    pub fn gaps(&self) -> impl Iterator<Item = (Instant, Instant)> {
        let pairs = self.parts.windows(2);
        pairs.map(|pair| (pair[0].0, pair[1].0))
    }
}

impl Server {
    /// A server by its address, with or without `/v1`.
    ///
    /// # Errors
    /// An https address where no certificate can be checked.
    pub fn new(url: &str, key: Option<String>) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1");
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("shoal-bench/", env!("CARGO_PKG_VERSION")));
        if url.starts_with("https://") {
            let tls = download::system_tls();
            if let Some(why) = tls.no_roots {
                let why = format!("no certificate can be checked: {why}");
                return Err(Failure::new(why).try_this("SSL_CERT_FILE=ca.pem").into());
            }
            config = config.tls_config(tls.config);
        } else if !url.starts_with("http://") {
            let why = format!("`{url}` is no address of a server");
            return Err(Failure::usage(why)
                .try_this("--url http://127.0.0.1:8080")
                .into());
        }
        Ok(Self {
            agent: config.build().new_agent(),
            url: url.to_owned(),
            key,
            model: String::new(),
        })
    }

    /// The models that it answers for, and the longest context where it says so.
    ///
    /// # Errors
    /// It does not say.
    pub fn models(&self) -> anyhow::Result<Vec<(String, Option<u32>)>> {
        let url = format!("{}/v1/models", self.url);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = request.call().with_context(|| format!("asking {url}"))?;
        let status = response.status().as_u16();
        let told = whole(response.into_body())?;
        if status != 200 {
            bail!("{url} said {status}: {}", message(&told));
        }
        let told: Value = serde_json::from_str(&told).context("reading the list of models")?;
        let model = |model: &Value| {
            let n_ctx = model["x_shoal"]["n_ctx"].as_u64();
            let n_ctx = n_ctx.and_then(|n_ctx| u32::try_from(n_ctx).ok());
            Some((model["id"].as_str()?.to_owned(), n_ctx))
        };
        let listed = told["data"].as_array().context("no list of models")?;
        Ok(listed.iter().filter_map(model).collect())
    }

    /// Asks and reads what comes; `more` is told of each part with tokens and hangs up by saying no.
    ///
    /// # Errors
    /// The server refuses for another reason than being full, or breaks off.
    pub fn ask(
        &self,
        prompt: &Prompt,
        max_tokens: u32,
        mut more: impl FnMut(Instant) -> bool,
    ) -> anyhow::Result<Reply> {
        let (path, body) = self.body(prompt, max_tokens);
        let url = format!("{}{path}", self.url);
        let mut request = self.agent.post(&url);
        request = request.header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let asked = Instant::now();
        let response = request.send(body.to_string());
        let response = response.with_context(|| format!("asking {url}"))?;
        let status = response.status().as_u16();
        if matches!(status, 429 | 503) {
            let after = response.headers().get("retry-after");
            let after = after.and_then(|after| after.to_str().ok()?.parse().ok());
            let after = after.map_or(PAUSE_MAX, Duration::from_secs);
            // Read to its end, the connection can be used again.
            whole(response.into_body())?;
            return Ok(Reply::Refused(after.min(PAUSE_MAX)));
        }
        if status != 200 {
            let told = whole(response.into_body())?;
            return Err(Refusal {
                status,
                message: message(&told),
            }
            .into());
        }
        let mut answer = Answer {
            asked,
            parts: Vec::new(),
            prompt_tokens: None,
            text: String::new(),
        };
        let mut body = BufReader::new(response.into_body().into_reader());
        let mut line = String::new();
        loop {
            line.clear();
            let read = body.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
            if read.context("reading an answer")? == 0 {
                bail!("an answer broke off after {} parts", answer.parts.len());
            }
            let Some(data) = line.strip_prefix("data:") else {
                continue;
            };
            if data.trim() == "[DONE]" {
                return Ok(Reply::Answer(answer));
            }
            let part: Value = serde_json::from_str(data).context("reading a part of an answer")?;
            if part.get("error").is_some() {
                bail!("an answer failed: {}", message(data));
            }
            if answer.add(&part) && !more(Instant::now()) {
                return Ok(Reply::Answer(answer));
            }
        }
    }

    fn body(&self, prompt: &Prompt, max_tokens: u32) -> (&'static str, Value) {
        // With the tokens' chances every token is a part of its own, also one that shows nothing yet.
        let mut body = json!({
            "model": self.model,
            "max_tokens": max_tokens,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match prompt {
            Prompt::Text(text) => {
                body["prompt"] = json!(text);
                body["logprobs"] = json!(0);
                ("/v1/completions", body)
            }
            Prompt::Chat(said) => {
                let role = |at: usize| {
                    if at.is_multiple_of(2) {
                        "user"
                    } else {
                        "assistant"
                    }
                };
                let said = said.iter().enumerate();
                body["messages"] = said
                    .map(|(at, text)| json!({"role": role(at), "content": text}))
                    .collect();
                body["logprobs"] = json!(true);
                ("/v1/chat/completions", body)
            }
        }
    }
}

impl Answer {
    /// Notes a part; whether it had tokens.
    fn add(&mut self, part: &Value) -> bool {
        if let Some(tokens) = part["usage"]["prompt_tokens"].as_u64() {
            self.prompt_tokens = Some(tokens);
        }
        let choice = &part["choices"][0];
        let chances = &choice["logprobs"];
        let listed = [&chances["tokens"], &chances["content"]];
        let listed = listed.iter().filter_map(|list| list.as_array());
        let tokens: usize = listed.map(Vec::len).sum();
        let text = [&choice["text"], &choice["delta"]["content"]];
        let text = text.iter().find_map(|text| text.as_str()).unwrap_or("");
        self.text += text;
        // A server that tells no chances still says something.
        let tokens = tokens.max(usize::from(!text.is_empty()));
        if tokens > 0 {
            self.parts.push((Instant::now(), tokens));
        }
        tokens > 0
    }
}

/// A request that the server will not answer however often it is asked.
#[derive(Debug, thiserror::Error)]
#[error("the server said {status}: {message}")]
pub struct Refusal {
    /// Its status.
    pub status: u16,
    message: String,
}

fn whole(body: ureq::Body) -> anyhow::Result<String> {
    let body = body.into_with_config().limit(LINE_BYTES_MAX);
    let mut text = String::new();
    body.reader()
        .read_to_string(&mut text)
        .context("reading an answer")?;
    Ok(text)
}

/// What an error in OpenAI's shape says.
fn message(told: &str) -> String {
    let read: Option<Value> = serde_json::from_str(told).ok();
    let said = read.as_ref().and_then(|it| it["error"]["message"].as_str());
    crate::figures::printable(said.unwrap_or(told).trim(), 300)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Answer {
        Answer {
            asked: Instant::now(),
            parts: Vec::new(),
            prompt_tokens: None,
            text: String::new(),
        }
    }

    #[test]
    fn tokens_are_counted_in_both_dialects_and_shown_or_not() {
        let mut answer = empty();
        let hidden = json!({"choices": [{"text": "", "logprobs": {"tokens": ["\u{fffd}"]}}]});
        assert!(answer.add(&hidden), "half a character is a token");
        let two = json!({"token": "a"});
        let chat =
            json!({"choices": [{"delta": {"content": "aa"}, "logprobs": {"content": [two, two]}}]});
        assert!(answer.add(&chat));
        let opening = json!({"choices": [{"delta": {"role": "assistant", "content": ""}}]});
        assert!(!answer.add(&opening), "who speaks is no token");
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 12}});
        assert!(!answer.add(&usage));
        let tokens: Vec<usize> = answer.parts.iter().map(|(_, tokens)| *tokens).collect();
        assert_eq!(tokens, [1, 2]);
        assert_eq!((answer.prompt_tokens, &*answer.text), (Some(12), "aa"));
        assert_eq!(answer.gaps().count(), 1);
    }

    #[test]
    fn an_address_is_one_of_a_server() {
        for url in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
        ] {
            let server = Server::new(url, None).expect("an address");
            assert_eq!(server.url, "http://h:1");
        }
        assert!(Server::new("h:1", None).is_err());
    }
}
