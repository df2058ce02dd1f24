# bash completion for kvferryctl
_kvferryctl() {
  local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local global='--help --socket --timeout --json --version'
  local commands='status workers peers rails health drain reload config transfers top arenas cancel trace plan doctor'
  local command='' word i words
  case $previous in
    --socket | --sender | --receiver | --worker-socket | --cuda-driver)
      mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      compopt -o filenames 2>/dev/null
      return ;;
    --timeout | --limit | --node | --boot | --watch | --count | --interval | --rows) return ;;
  esac
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    case $word in
      --socket | --timeout) ((i++)) ;;
      -*) ;;
      *)
        if [ -z "$command" ]; then
          command=$word
        elif [ "$command $word" = 'arenas release' ]; then
          command='arenas release'
        fi ;;
    esac
  done
  case $command in
    '') words="$global $commands" ;;
    drain) words='--help --limit' ;;
    transfers) words='--help --limit --watch --count' ;;
    top) words='--help --interval --count --once --rows' ;;
    arenas) words='--help release' ;;
    'arenas release') words='--help --node --boot' ;;
    plan) words='--help --sender --receiver --fragments --text' ;;
    doctor) words='--help --worker-socket --cuda-driver' ;;
    *) words='--help' ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -F _kvferryctl kvferryctl
