# bash completion for kvferryd
_kvferryd() {
  local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  case $previous in
    --config)
      mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      compopt -o filenames 2>/dev/null
      return ;;
    --set) return ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W '--help --config --set --check-config --print-default-config --print-config --version' -- "$cur")
}
complete -F _kvferryd kvferryd
