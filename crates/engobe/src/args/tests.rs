//! Command lines that are right, and what is said about those that are not.

use super::*;

#[test]
fn the_command_line_is_sound() {
    Cli::description().debug_assert();
}

fn train(args: &[&str]) -> settings::SettingFlags {
    let args = ["engobe", "train"].iter().chain(args).copied();
    match Cli::read_from(args).unwrap().command {
        Task::Train(args) => args.settings.flags,
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_are_flags() {
    let flags = train(&[
        "--learning-rate",
        "1e-4",
        "--no-packing",
        "--use-rslora",
        "--data",
        "a",
        "--data",
        "b",
        "--r",
        "-1",
    ]);
    let given: Vec<(&str, &str)> = flags.given.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    for pair in [
        ("learning_rate", "1e-4"),
        ("packing", "false"),
        ("use_rslora", "true"),
        ("data", "a"),
        ("data", "b"),
        ("r", "-1"),
    ] {
        assert!(given.contains(&pair), "{pair:?} in {given:?}");
    }
}

#[test]
fn mistakes_are_one_line() {
    let error = Cli::read_from(["engobe", "train", "--lerning-rate", "1"]).unwrap_err().to_string();
    let line = one_line(&error);
    assert!(!line.contains('\n') && line.contains("--learning-rate"), "{line}");
}

#[test]
fn negative_numbers_and_dashes_are_values() {
    let error = |args: &[&str]| one_line(&Cli::read_from(args).unwrap_err().to_string());
    for (args, flag) in [
        (&["engobe", "generate", "--model", "m", "--prompt", "x", "--top-k", "-1"][..], "--top-k"),
        (&["engobe", "demo", "--seed", "-3"], "--seed"),
        (&["engobe", "lint", "--model", "m", "--data", "d", "--show", "-2"], "--show"),
        (&["engobe", "eval", "--model", "m", "--data", "d", "--max-seq-len", "-1"], "--max-seq-len"),
    ] {
        assert!(error(args).contains(flag), "{}", error(args));
    }
    let args = ["engobe", "generate", "--model", "m", "--prompt", "- one", "--stop", "--", "--stop", "-5"];
    let Task::Generate(read) = Cli::read_from(args).unwrap().command else { panic!("another command") };
    assert_eq!(
        (read.prompt.as_deref(), read.stop),
        (Some("- one"), vec!["--".to_string(), "-5".to_string()])
    );
}

/// Words of a command line as a shell splits them; quotes keep blanks.
fn words(line: &str) -> Vec<String> {
    let pieces = line.split('"').enumerate();
    let mut words = Vec::new();
    for (i, piece) in pieces {
        match i % 2 {
            0 => words.extend(piece.split_whitespace().map(str::to_string)),
            _ => words.push(piece.to_string()),
        }
    }
    words
}

/// What help texts and README tell people to type can be typed.
#[test]
fn every_printed_command_is_accepted() {
    // what stands between fences is a command, what stands outside is prose
    let readme = include_str!("../../../../README.md").split("```").skip(1).step_by(2);
    let mut texts: Vec<String> = readme.chain([START]).map(str::to_string).collect();
    for command in Cli::description().get_subcommands() {
        texts.extend(command.get_after_help().map(ToString::to_string));
    }
    let mut seen = 0;
    for line in texts.iter().flat_map(|t| t.lines()).map(str::trim) {
        // a remark follows after several blanks
        let line = line.split("   ").next().unwrap_or_default();
        if line.starts_with("engobe ") {
            seen += 1;
            if let Err(error) = Cli::read_from(words(line)) {
                panic!("{line}: {error}");
            }
        }
    }
    assert!(seen > 15, "{seen}");
}
