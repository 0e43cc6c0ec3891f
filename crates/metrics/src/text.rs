//! Texts beside texts: exact match, BLEU with sacrebleu's numbers, ROUGE-L with rouge_score's.

use std::collections::HashMap;

/// Share of texts that equal their reference up to the whitespace around them; 0 without texts.
pub fn exact_match<R: AsRef<str>, H: AsRef<str>>(references: &[R], texts: &[H]) -> f64 {
    let n = references.len().min(texts.len());
    let same = |(a, b): &(&R, &H)| a.as_ref().trim() == b.as_ref().trim();
    references.iter().zip(texts).filter(same).count() as f64 / n.max(1) as f64
}

/// Longest n-gram that BLEU counts.
const ORDER: usize = 4;

/// BLEU of a corpus (Papineni et al. 2002), one reference a text, in 0..=100: sacrebleu's default, that is the 13a
/// tokenizer, case as it is, exponential smoothing.
pub fn bleu<R: AsRef<str>, H: AsRef<str>>(references: &[R], texts: &[H]) -> f64 {
    let (mut correct, mut total) = ([0usize; ORDER], [0usize; ORDER]);
    let (mut length, mut reference_length) = (0, 0);
    for (reference, text) in references.iter().zip(texts) {
        let (reference, text) = (tokenize_13a(reference.as_ref()), tokenize_13a(text.as_ref()));
        length += text.len();
        reference_length += reference.len();
        for n in 1..=ORDER {
            let there = ngrams(&reference, n);
            for (gram, count) in ngrams(&text, n) {
                total[n - 1] += count;
                correct[n - 1] += count.min(there.get(&gram).copied().unwrap_or(0));
            }
        }
    }
    combine(correct, total, length, reference_length)
}

/// The geometric mean of the precisions times the penalty for being short. An n-gram length without a match counts
/// as a half, the next a quarter, ... of a match (smoothing 3 of Chen & Cherry 2014).
fn combine(correct: [usize; ORDER], total: [usize; ORDER], length: usize, reference_length: usize) -> f64 {
    if correct.iter().all(|c| *c == 0) {
        return 0.0;
    }
    let (mut smooth, mut logs) = (1.0, 0.0);
    for n in 0..ORDER {
        if total[n] == 0 {
            // texts shorter than an n-gram: sacrebleu's precision is 0, and so is the score
            return 0.0;
        }
        let precision = if correct[n] == 0 {
            smooth *= 2.0;
            100.0 / (smooth * total[n] as f64)
        } else {
            100.0 * correct[n] as f64 / total[n] as f64
        };
        logs += precision.ln();
    }
    let short = length < reference_length;
    let penalty = if short { (1.0 - reference_length as f64 / length as f64).exp() } else { 1.0 };
    penalty * (logs / ORDER as f64).exp()
}

fn ngrams(tokens: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    for gram in tokens.windows(n) {
        *counts.entry(gram).or_insert(0) += 1;
    }
    counts
}

/// The tokenizer of mteval-v13a as sacrebleu has it.
fn tokenize_13a(text: &str) -> Vec<String> {
    let mut text = trim_end(text).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        for (from, to) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
            text = text.replace(from, to);
        }
    }
    let mut spaced = Vec::new();
    for c in format!(" {text} ").chars() {
        let set_off = matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/');
        if set_off {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
    let point = |c: char| c == '.' || c == ',';
    let digit = |c: char| c.is_ascii_digit();
    spaced = at_pairs(&spaced, |a, b| !digit(a) && point(b), |a, b| [a, ' ', b, ' ']);
    spaced = at_pairs(&spaced, |a, b| point(a) && !digit(b), |a, b| [' ', a, ' ', b]);
    spaced = at_pairs(&spaced, |a, b| digit(a) && b == '-', |a, b| [a, ' ', b, ' ']);
    let text: String = spaced.into_iter().collect();
    text.split(is_space).filter(|t| !t.is_empty()).map(str::to_string).collect()
}

/// Replaces each pair of characters that `wanted` accepts, from the left, as a regular expression would.
fn at_pairs(
    text: &[char],
    wanted: impl Fn(char, char) -> bool,
    by: impl Fn(char, char) -> [char; 4],
) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len() * 2);
    let mut i = 0;
    while i < text.len() {
        match text.get(i + 1) {
            Some(&next) if wanted(text[i], next) => {
                out.extend(by(text[i], next));
                i += 2;
            }
            _ => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}

/// What Python's `str.split` splits at.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Mean ROUGE-L F1 over texts (Lin 2004), as rouge_score's `rougeL` without stemmer; 0 without texts.
pub fn rouge_l<R: AsRef<str>, H: AsRef<str>>(references: &[R], texts: &[H]) -> f64 {
    let n = references.len().min(texts.len());
    let one = |(a, b): (&R, &H)| {
        let (reference, text) = (rouge_tokens(a.as_ref()), rouge_tokens(b.as_ref()));
        if reference.is_empty() || text.is_empty() {
            return 0.0;
        }
        let common = longest_common_subsequence(&reference, &text) as f64;
        2.0 * common / (reference.len() + text.len()) as f64
    };
    references.iter().zip(texts).map(one).sum::<f64>() / n.max(1) as f64
}

/// Runs of ASCII letters and digits of the text in lower case.
fn rouge_tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts = lower.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
    parts.filter(|t| !t.is_empty()).map(str::to_string).collect()
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
