//! Models by hub id, against a server that answers as the hub does.

mod support;

use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use support::{engobe, error, golden};

/// A commit and its files.
type Repository = (String, BTreeMap<String, Vec<u8>>);

/// What the hub holds, and what it was asked.
#[derive(Default)]
struct Hub {
    repos: Mutex<BTreeMap<String, Repository>>,
    asked: Mutex<Vec<String>>,
}

impl Hub {
    fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = hub.clone();
                std::thread::spawn(move || hub.answer(stream));
            }
        });
        address
    }

    fn put(&self, repo: &str, commit: &str, files: &[(&str, Vec<u8>)]) {
        let files = files.iter().map(|(n, b)| (n.to_string(), b.clone())).collect();
        self.repos.lock().unwrap().insert(repo.to_string(), (commit.to_string(), files));
    }

    fn downloads(&self) -> usize {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .filter(|l| l.contains("/resolve/") && !l.contains("bytes=0-0"))
            .count()
    }

    /// One request, one answer.
    fn answer(&self, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(request)) = lines.next() else { return };
        let headers: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
        let header = |name: &str| {
            let find =
                headers.iter().find_map(|h| h.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
            find.map(|(_, value)| value.to_string())
        };
        let (range, token) = (header("range"), header("authorization"));
        self.asked.lock().unwrap().push(format!(
            "{request} {} {}",
            range.clone().unwrap_or_default(),
            token.unwrap_or_default()
        ));
        let path = request.split(' ').nth(1).unwrap_or_default().to_string();
        let (status, extra, body) = self.find(&path, range.as_deref());
        let body = if request.starts_with("HEAD") { Vec::new() } else { body };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n",
            body.len()
        );
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
    }

    fn find(&self, path: &str, range: Option<&str>) -> (&'static str, String, Vec<u8>) {
        let none = || ("404 Not Found", String::new(), b"nothing".to_vec());
        let repos = self.repos.lock().unwrap();
        if path == "/" {
            return ("200 OK", String::new(), Vec::new());
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            let Some((repo, _)) = rest.split_once("/revision/") else { return none() };
            let Some((commit, files)) = repos.get(repo) else { return none() };
            let siblings: Vec<_> = files.keys().map(|f| json!({ "rfilename": f })).collect();
            return (
                "200 OK",
                String::new(),
                json!({ "sha": commit, "siblings": siblings }).to_string().into_bytes(),
            );
        }
        let Some((repo, rest)) = path.trim_start_matches('/').split_once("/resolve/") else { return none() };
        let file = rest.split_once('/').map_or("", |(_, file)| file);
        let Some((commit, files)) = repos.get(repo) else { return none() };
        let Some(bytes) = files.get(file) else { return none() };
        let (from, to) =
            range.and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(bytes.len(), |t: usize| (t + 1).min(bytes.len()));
        let extra = format!(
            "ETag: \"{commit}-{file}\"\r\nX-Repo-Commit: {commit}\r\nContent-Range: bytes {from}-{}/{}\r\n",
            to.max(1) - 1,
            bytes.len()
        );
        ("206 Partial Content", extra, bytes[from.min(to)..to].to_vec())
    }
}

fn model_files(name: &str) -> Vec<(&'static str, Vec<u8>)> {
    let read = |file: &str| std::fs::read(golden(&format!("llama/{name}/{file}"))).unwrap();
    vec![
        ("config.json", read("config.json")),
        ("model.safetensors", read("model.safetensors")),
        ("README.md", vec![b'#']),
    ]
}

fn sharded_files() -> Vec<(&'static str, Vec<u8>)> {
    let dir = golden("llama/plain");
    let names = ["config.json", "model.safetensors.index.json"].into_iter().map(str::to_string);
    let shards = (1..=5).map(|i| format!("model-{i:05}-of-00005.safetensors"));
    let read = |name: String| {
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        (&*Box::leak(name.into_boxed_str()), bytes)
    };
    names.chain(shards).map(read).collect()
}

fn eval(id: &str, home: &Path, endpoint: &str) -> Command {
    let data = golden("peft/rows.jsonl").display().to_string();
    let mut command = engobe(&["eval", "--model", id, "--data", &data]);
    command.env("HF_HOME", home).env("HF_ENDPOINT", endpoint).env("NO_PROXY", "127.0.0.1");
    command
}

fn loss(command: &mut Command) -> f64 {
    support::json(command)["loss"].as_f64().unwrap()
}

#[test]
fn a_model_comes_once_and_stays() {
    let (hub, home) = (Arc::new(Hub::default()), tempfile::tempdir().unwrap());
    let endpoint = hub.serve();
    hub.put("org/tiny", "c0ffee", &model_files("gqa_tied"));
    let here = golden("llama/gqa_tied").display().to_string();
    let expected = loss(&mut eval(&here, home.path(), &endpoint));
    assert_eq!(loss(&mut eval("org/tiny", home.path(), &endpoint)), expected);
    let downloads = hub.downloads();
    assert_eq!(downloads, 2, "{:?}", hub.asked.lock().unwrap());
    // the second time nothing is downloaded; offline and without the hub it is there too
    assert_eq!(loss(&mut eval("org/tiny", home.path(), &endpoint)), expected);
    assert_eq!(loss(eval("org/tiny", home.path(), &endpoint).env("HF_HUB_OFFLINE", "1")), expected);
    assert_eq!(loss(eval("org/tiny", home.path(), &endpoint).arg("--offline")), expected);
    assert_eq!(loss(&mut eval("org/tiny", home.path(), "http://127.0.0.1:9")), expected);
    assert_eq!(hub.downloads(), downloads);
    // the cache is laid out as Python's huggingface_hub has it
    assert!(home.path().join("hub/models--org--tiny/snapshots/c0ffee/config.json").exists());
    // a new commit on the hub is noticed
    hub.put("org/tiny", "decade", &model_files("llama3"));
    assert_ne!(loss(&mut eval("org/tiny", home.path(), &endpoint)), expected);
}

#[test]
fn shards_come_all() {
    let (hub, home) = (Arc::new(Hub::default()), tempfile::tempdir().unwrap());
    let endpoint = hub.serve();
    hub.put("org/shards", "abc", &sharded_files());
    let here = golden("llama/plain").display().to_string();
    let expected = loss(&mut eval(&here, home.path(), &endpoint));
    assert_eq!(loss(&mut eval("org/shards", home.path(), &endpoint)), expected);
    // a snapshot that lost a shard is not taken for whole
    let shard = home.path().join("hub/models--org--shards/snapshots/abc/model-00003-of-00005.safetensors");
    std::fs::remove_file(shard).unwrap();
    let (_, line) = error(eval("org/shards", home.path(), &endpoint).arg("--offline"));
    assert!(line.contains("not complete"), "{line}");
    assert_eq!(loss(&mut eval("org/shards", home.path(), &endpoint)), expected);
}

#[test]
fn a_gguf_file_stays_too() {
    let (hub, home) = (Arc::new(Hub::default()), tempfile::tempdir().unwrap());
    let endpoint = hub.serve();
    hub.put("org/gguf", "abc", &[(".gitattributes", vec![0]), ("a.Q8_0.gguf", b"weights".to_vec())]);
    hub.put("org/ggufs", "abc", &[("a.gguf", b"one".to_vec()), ("sub/b.gguf", b"two".to_vec())]);
    for (id, content) in
        [("org/gguf", "weights"), ("org/ggufs:a.gguf", "one"), ("org/ggufs:sub/b.gguf", "two")]
    {
        let fetched = |more: &[&str], endpoint: &str| {
            let args: Vec<&str> = ["fetch", id].iter().chain(more).copied().collect();
            let mut command = engobe(&args);
            command.env("HF_HOME", home.path()).env("HF_ENDPOINT", endpoint).env("NO_PROXY", "127.0.0.1");
            let path = support::json(&mut command)["path"].as_str().unwrap().to_string();
            std::fs::read_to_string(path).unwrap()
        };
        assert_eq!(fetched(&[], &endpoint), content);
        assert_eq!(fetched(&["--offline"], &endpoint), content, "{id} offline");
        assert_eq!(fetched(&[], "http://127.0.0.1:9"), content, "{id} without the hub");
        // by its commit
        let (repo, file) = id.split_once(':').map_or((id, String::new()), |(r, f)| (r, format!(":{f}")));
        let mut command = engobe(&["fetch", &format!("{repo}@abc{file}"), "--offline"]);
        support::json(command.env("HF_HOME", home.path()));
    }
}

#[test]
fn what_the_hub_lacks_is_named() {
    let (hub, home) = (Arc::new(Hub::default()), tempfile::tempdir().unwrap());
    let endpoint = hub.serve();
    hub.put("org/ggufs", "abc", &[("a.Q4_0.gguf", vec![1]), ("a.Q8_0.gguf", vec![2])]);
    hub.put("org/pickle", "abc", &[("config.json", b"{}".to_vec()), ("pytorch_model.bin", vec![1])]);
    for (id, part) in [
        ("org/none", "org/none"),
        ("org/ggufs", "org/ggufs:a.Q4_0.gguf"),
        ("org/ggufs:b.gguf", "b.gguf"),
        ("org/pickle", "safetensors"),
    ] {
        let (status, line) = error(&mut eval(id, home.path(), &endpoint));
        assert!(status == 1 && line.contains(part), "{id}: {line}");
    }
    let (_, line) = error(&mut eval("org/never", home.path(), "http://127.0.0.1:9"));
    assert!(line.contains("cannot be reached"), "{line}");
}

#[test]
fn the_token_is_sent() {
    let (hub, home) = (Arc::new(Hub::default()), tempfile::tempdir().unwrap());
    let endpoint = hub.serve();
    hub.put("org/gated", "abc", &model_files("gqa_tied"));
    loss(eval("org/gated", home.path(), &endpoint).env("HF_TOKEN", "hf_secret"));
    assert!(hub.asked.lock().unwrap().iter().any(|l| l.contains("/api/") && l.contains("Bearer hf_secret")));
}
