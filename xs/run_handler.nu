# Keeps the closure of script.nu running: an array of inputs a line on file descriptor 3, an answer
# a line on standard output (docs/scripts.md tells the protocol).
#
# Each line of ours begins with a mark that no script can guess, since a script's own `print` goes
# to standard output too. The first says that the closure is one and waits.

use xs.nu *

const GATHERED = 7 # the tag under which .append sends what it is given
const END = "end of what this frame appends"

# What the closure appended while it ran: .append sends it to this job.
def xs-gathered [] {
  $END | job send 0 --tag $GATHERED
  let first = (job recv --tag $GATHERED)
  if $first == $END { return null }
  mut found: list<any> = [$first]
  while ($found | length) < 50 {
    let next = (job recv --tag $GATHERED)
    if $next == $END { return $found }
    $found = ($found | append $next)
  }
  # A stream costs more to begin with, but not each time as much as all before it.
  $found | append (generate {|_: any = 0|
    let next = (job recv --tag $GATHERED)
    if $next == $END { {} } else { {out: $next, next: 0} }
  })
}

# Output as JSON has it: bytes go as base64.
def xs-plain [value: any] {
  match ($value | describe --detailed | get type) {
    "binary" => {content_base64: ($value | encode base64)}
    "record" => (xs-plain-record $value)
    "list" | "table" | "range" => ($value | each {|item| xs-plain-item $item })
    _ => $value
  }
}

def xs-plain-item [value: any] {
  match ($value | describe --detailed | get type) {
    "binary" => {content_base64: ($value | encode base64)}
    "record" => (xs-plain-record $value)
    _ => $value
  }
}

def xs-plain-record [value: record] {
  if ($value.content? | describe) != "binary" { return $value }
  $value | reject content | insert content_base64 ($value.content | encode base64)
}

# A frame as a closure is given it: bytes that came as base64 are bytes again.
def xs-frame [frame: record] {
  let content = ($frame.content_base64 | decode base64)
  $frame | reject content_base64 | insert content $content
}

const RESULTS = [[], [state], [out], [state, out], [out, state]]

def xs-check-result [result: any] {
  if ($result | describe) starts-with "record" and ($result | columns) in $RESULTS { return }
  error make --unspanned {
    msg: $"a stateful handler's closure returns {state?, out?} or null, not ($result | to nuon)"
  }
}

def xs-failed [error: record] {
  let text = ($error.rendered? | default ($error.msg? | default "it failed") | to json --raw)
  $"($env.XS_MARK){\"error\":($text)}\n"
}

# Fields of an answer as JSON, or null.
def xs-line [state: string, out: any, appended: any] {
  mut parts: list<string> = if $state == "" { [] } else { [$state] }
  if $out != null {
    let text = (xs-plain $out | to json --raw)
    $parts = ($parts | append $"\"out\":($text)")
  }
  if $appended != null {
    let text = ($appended | to json --raw)
    $parts = ($parts | append $"\"append\":($text)")
  }
  let text = ($parts | str join ",")
  $"($env.XS_MARK){($text)}\n"
}

# `$in`, and input to a command of our own, would cost 0.2 ms a frame: what runs for each frame does
# without, and does nothing where there is nothing to do.
def xs-stateless [closure: closure] {
  each {|input|
    try {
      let frame = if $input.frame.content_base64? == null { $input.frame } else { xs-frame $input.frame }
      let out = (do $closure $frame)
      let appended = (xs-gathered)
      if $out == null and $appended == null { $"($env.XS_MARK)null\n" } else {
        xs-line "" $out $appended
      }
    } catch {|error| xs-failed $error }
  }
}

def xs-stateful [closure: closure] {
  # The first input is the state to begin with.
  generate {|input, state: any = null|
    if $input.frame? == null { {out: "", next: $input.state} } else {
      try {
        let frame = if $input.frame.content_base64? == null { $input.frame } else { xs-frame $input.frame }
        let result = (do $closure $frame $state)
        let appended = (xs-gathered)
        if $result == null {
          {out: (if $appended == null { $"($env.XS_MARK)null\n" } else { xs-line "" null $appended }), next: $state}
        } else {
          xs-check-result $result
          if "state" in $result {
            # Through JSON, so that it is the same before and after a restart.
            let text = ($result.state | to json --raw)
            {out: (xs-line $"\"state\":($text)" $result.out? $appended), next: ($text | from json)}
          } else {
            {out: (xs-line "" $result.out? $appended), next: $state}
          }
        }
      } catch {|error| {out: (xs-failed $error), next: $state} }
    }
  }
}

def main [kind: string] {
  let closure: any = (source script.nu)
  let found = ($closure | describe)
  if $found != "closure" {
    error make --unspanned {msg: $"the script is not a closure but a ($found): write {|frame| …}"}
  }
  print $"($env.XS_MARK)start"
  open --raw /dev/fd/3 | lines | each {|line| $line | from json } | flatten | if $kind == "stateful" {
    xs-stateful $closure
  } else {
    xs-stateless $closure
  } | str join
}

# The same script once more, in a place that takes nothing but a closure: what is none is found
# before anything of it runs. Here at the end, so that other mistakes are told of the script itself.
use typed.nu
