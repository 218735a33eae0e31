package remote

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// hosts are where the content of one namespace (a registry's name in references) may be had.
type hosts struct {
	from string // the file or folder that says so
	list []host // in the order in which they are asked; the last is the upstream
}

// host is one of them. It does not change.
type host struct {
	key    string // what names it in from, for errors
	scheme string
	at     name.Registry // zero: the namespace's own registry, by the scheme that it speaks
	path   string        // of the API, without a slash at its end
	pull   bool          // it may be asked for what has a digest
	tags   bool          // and for what has none

	ca         []string    // files, added to the system's
	client     [][2]string // files of a certificate and of its key; which may be one
	skipVerify *bool
	dial       time.Duration // bounds one connection attempt; 0 is the transport's own bound
	header     http.Header
}

// ownTLS reports whether anything of TLS is set, if only to its default.
func (h *host) ownTLS() bool { return h.ca != nil || h.client != nil || h.skipVerify != nil }

const (
	hub         = "docker.io"            // as references and folders name it
	hubRegistry = "registry-1.docker.io" // as containerd does, and its documentation
)

// namespace is the name by which containerd knows a registry.
func namespace(registry string) string {
	if registry == name.DefaultRegistry {
		return hub
	}
	return registry
}

// readHosts returns the hosts of a namespace as they are set below roots, or nil. Roots is a folder or, as
// containerd's config_path may be, a list of folders.
func readHosts(roots, namespace string) (*hosts, error) {
	for _, root := range filepath.SplitList(roots) {
		for _, folder := range hostFolders(namespace) {
			dir := filepath.Join(root, folder)
			_, err := os.Stat(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("hosts of %s: %w: make it readable, or set another folder", namespace, err)
			}
			return readHostFolder(dir)
		}
	}
	return nil, nil
}

// hostFolders returns the names that a namespace's folder may have, the first that exists counts.
func hostFolders(namespace string) (list []string) {
	if i := strings.LastIndexByte(namespace, ':'); i > 0 {
		list = append(list, namespace[:i]+"_"+namespace[i+1:]+"_")
	}
	// A reference may call its registry "..": that is no folder here.
	if filepath.IsLocal(namespace) && namespace != "." && filepath.Base(namespace) == namespace {
		list = append(list, namespace)
	}
	return append(list, "_default")
}

func readHostFolder(dir string) (*hosts, error) {
	file := filepath.Join(dir, "hosts.toml")
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: make it readable, or remove it", err)
	}
	if len(b) == 0 {
		return dockerCertificates(dir)
	}
	list, err := parseHosts(b, dir)
	if err != nil {
		return nil, fmt.Errorf("%s%w", file, err)
	}
	return &hosts{file, list}, nil
}

// dockerCertificates reads a folder as docker does: *.crt are CAs, *.cert client certificates with their keys in
// *.key, all for the namespace's own registry.
func dockerCertificates(dir string) (*hosts, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: make it a readable folder, or remove it", err)
	}
	h := host{key: "its certificates", pull: true, tags: true}
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		switch filepath.Ext(file) {
		case ".crt":
			h.ca = append(h.ca, file)
		case ".cert":
			key := strings.TrimSuffix(file, ".cert") + ".key"
			if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) {
				key = file
			}
			h.client = append(h.client, [2]string{file, key})
		}
	}
	return &hosts{dir, []host{h}}, nil
}

// hostTable is a table of hosts.toml. What may have more than one type is parsed by hand.
type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// parseHosts parses a hosts.toml, whose files are relative to dir. The error is to follow the name of the file.
func parseHosts(b []byte, dir string) ([]host, error) {
	var file struct {
		hostTable
		Server string               `toml:"server"`
		Host   map[string]hostTable `toml:"host"`
	}
	if err := toml.Unmarshal(b, &file); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			line, _ := at.Position()
			return nil, fmt.Errorf(":%d: %s: correct that line; containerd's docs/hosts.md says what may be there", line, strings.TrimPrefix(err.Error(), "toml: "))
		}
		return nil, fmt.Errorf(": %w: correct it; containerd's docs/hosts.md says what may be there", err)
	}
	var list []host
	for _, url := range hostOrder(b) {
		key := "host." + strconv.Quote(url)
		t, ok := file.Host[url]
		if !ok {
			continue
		}
		h, err := t.host(dir)
		if err != nil {
			return nil, fmt.Errorf(": %s.%w", key, err)
		}
		if err := h.parseURL(url, t.OverridePath); err != nil {
			return nil, fmt.Errorf(": %s: %w", key, err)
		}
		h.key = key
		list = append(list, h)
	}
	upstream, err := file.host(dir)
	if err != nil {
		return nil, fmt.Errorf(": %w", err)
	}
	upstream.key = "server"
	if file.Server == "" {
		upstream.pull, upstream.tags = true, true // capabilities are those of a server that is named
	} else if err := upstream.parseURL(file.Server, file.OverridePath); err != nil {
		return nil, fmt.Errorf(": server = %q: %w", file.Server, err)
	}
	return append(list, upstream), nil
}

// hostOrder returns the hosts of a hosts.toml, which was parsed without an error, in its order, which a map forgets.
func hostOrder(b []byte) (order []string) {
	add := func(key []string) {
		if len(key) >= 2 && key[0] == "host" && !slices.Contains(order, key[1]) {
			order = append(order, key[1])
		}
	}
	keys := func(n *unstable.Node) (key []string) {
		for it := n.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		return key
	}
	var p unstable.Parser
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = keys(e)
			add(table)
		case unstable.KeyValue:
			key := slices.Concat(table, keys(e))
			add(key)
			if e.Value().Kind == unstable.InlineTable { // host = {"https://…" = {…}}
				for it := e.Value().Children(); it.Next(); {
					add(slices.Concat(key, keys(it.Node())))
				}
			}
		}
	}
	return order
}

// host returns what a table says of its host, but the address. The error begins with the key that is wrong.
func (t *hostTable) host(dir string) (h host, err error) {
	bad := func(key, want string, have any) error {
		return fmt.Errorf("%s = %.100q: want %s", key, fmt.Sprint(have), want)
	}
	h.skipVerify = t.SkipVerify
	h.pull, h.tags = len(t.Capabilities) == 0, len(t.Capabilities) == 0
	for _, c := range t.Capabilities {
		switch strings.ToLower(c) {
		case "pull":
			h.pull = true
		case "resolve":
			h.tags = true
		case "push", "referrers":
		default:
			return h, bad("capabilities", `some of "pull", "resolve", "push", "referrers"`, c)
		}
	}
	h.tags = h.tags && h.pull
	if t.CA != nil {
		if h.ca = stringList(t.CA); h.ca == nil {
			return h, bad("ca", "a file or a list of files", t.CA)
		}
	}
	if t.Client != nil {
		if h.client = clientPairs(t.Client); h.client == nil {
			return h, bad("client", `a file, a list of files, or a list of pairs ["CERT", "KEY"]`, t.Client)
		}
	}
	h.makeAbsolute(dir)
	if t.DialTimeout != "" {
		if h.dial, err = time.ParseDuration(t.DialTimeout); err != nil || h.dial <= 0 {
			return h, bad("dial_timeout", `a time such as "1s"`, t.DialTimeout)
		}
	}
	for k, v := range t.Header {
		values := stringList(v)
		if values == nil || !isHeader(k, values) {
			return h, fmt.Errorf("header.%q: want a header's name and one value or a list of them, without line breaks", k)
		}
		if h.header == nil {
			h.header = make(http.Header)
		}
		h.header[http.CanonicalHeaderKey(k)] = append(h.header.Values(k), values...)
	}
	return h, nil
}

func (h *host) makeAbsolute(dir string) {
	for i, file := range h.ca {
		h.ca[i] = absolute(dir, file)
	}
	for i, pair := range h.client {
		h.client[i] = [2]string{absolute(dir, pair[0]), absolute(dir, cmp.Or(pair[1], pair[0]))}
	}
}

func absolute(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

// parseURL sets where the host is. Without a scheme it is https.
func (h *host) parseURL(text string, overridePath bool) error {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errors.New(`want "https://HOST[:PORT][/PATH]", or http`)
	}
	if h.at, err = name.NewRegistry(u.Host); err != nil { // docker.io is the Hub's registry here too
		return fmt.Errorf("%w: correct the host's name", err)
	}
	h.scheme = u.Scheme
	h.path = strings.TrimSuffix(path.Clean("/"+u.Path), "/")
	if !overridePath && !strings.HasSuffix(h.path, "/v2") {
		h.path += "/v2"
	}
	return nil
}

// plainPort reports whether the host is at the port of HTTP without TLS.
func (h *host) plainPort() bool {
	_, port, err := net.SplitHostPort(h.at.RegistryStr())
	return err == nil && port == "80"
}

// stringList returns the strings of a value that is one or a list of them, or nil.
func stringList(v any) []string {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		list := make([]string, 0, len(v))
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil
			}
			list = append(list, s)
		}
		return list
	}
	return nil
}

// clientPairs returns the pairs of files that a value is, or nil. A file alone has both, the certificate and the key.
func clientPairs(v any) [][2]string {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	pairs := make([][2]string, 0, len(list))
	for _, e := range list {
		s := stringList(e)
		_, alone := e.(string)
		switch {
		case alone:
			pairs = append(pairs, [2]string{s[0], s[0]})
		case len(s) == 2:
			pairs = append(pairs, [2]string{s[0], s[1]})
		default:
			return nil
		}
	}
	return pairs
}

// isHeader reports whether HTTP can carry a header.
func isHeader(key string, values []string) bool {
	if token, rest := cutToken(key); token == "" || rest != "" {
		return false
	}
	return !slices.ContainsFunc(values, func(v string) bool { return strings.ContainsAny(v, "\r\n\x00") })
}
