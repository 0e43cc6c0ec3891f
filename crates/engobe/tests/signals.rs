//! Runs that are asked to stop, and runs that nobody watches any more.
#![cfg(unix)]

mod support;

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use support::{engobe, golden, json};

fn train(out: &Path, steps: &str, more: &[&str]) -> std::process::Command {
    let path = |p: &Path| p.display().to_string();
    let (model, data, out) = (path(&golden("llama/gqa_tied")), path(&golden("peft/rows.jsonl")), path(out));
    let args = ["train", "--model", &model, "--data", &data, "--out", &out, "--max-steps", steps];
    let fixed = ["--r", "2", "--allow", "eot-never-label", "--lr-scheduler", "constant"];
    engobe(&args.iter().chain(&fixed).chain(more).copied().collect::<Vec<_>>())
}

/// Waits until the run has done a few steps.
fn wait_for_steps(out: &Path, child: &mut Child) {
    let begun = Instant::now();
    let lines = || fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while lines() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no steps after a minute");
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_run_that_is_told_to_stop_saves_and_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    for (name, signal) in [("int", libc::SIGINT), ("term", libc::SIGTERM), ("hup", libc::SIGHUP)] {
        let out = dir.path().join(name);
        let mut command = train(&out, "1000000", &["--json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        wait_for_steps(&out, &mut child);
        // SAFETY: sends a signal to our own child, which has not been waited for yet.
        assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{name}: {}", done.status);
        let said: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(said["interrupted"], true, "{said}");
        let steps = said["steps"].as_u64().unwrap();
        assert!(out.join("adapter_model.safetensors").exists());
        let more = json(&mut train(&out, &(steps + 2).to_string(), &["--resume"]));
        assert_eq!(more["steps"], steps + 2);
        let whole = dir.path().join(format!("{name}-whole"));
        json(&mut train(&whole, &(steps + 2).to_string(), &[]));
        let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
        assert_eq!(bytes(&out), bytes(&whole), "{name}");
    }
}

#[test]
fn a_run_whose_watcher_has_gone_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child = train(&out, "20", &[]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // as `2>&1 | head -1` does, or a terminal that is closed
    drop(child.stderr.take());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(out.join("adapter_model.safetensors").exists());
}
