package credentials

import (
	"encoding/hex"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// encode writes p as a PullImageRequest, with fields around it that are not read here.
func (p pull) encode() (b []byte) {
	text := func(b []byte, n protowire.Number, s string) []byte {
		if s == "" {
			return b
		}
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
	}
	annotation := text(text(nil, 1, "key"), 2, "value")
	image := text(text(text(nil, 1, p.image), 2, string(annotation)), 18, "user-specified")
	var auth []byte
	for i, s := range []string{p.username, p.password, p.auth, p.serverAddress, p.identityToken, p.registryToken} {
		auth = text(auth, protowire.Number(i+1), s)
	}
	b = protowire.AppendVarint(protowire.AppendTag(b, 1000, protowire.VarintType), 7)
	b = text(b, 1, string(image))
	b = text(b, 2, string(auth))
	return text(b, 3, "\n\x05\n\x03pod") // sandbox_config
}

func TestParsePull(t *testing.T) {
	full := pull{"r.example.com/app:1", "user", "password", "auth", "https://r.example.com", "identity", "registry"}
	for _, p := range []pull{{}, {image: "app"}, {image: "app", password: "only"}, full} {
		if got, err := parsePull(p.encode()); err != nil || got != p {
			t.Errorf("%+v comes back as %+v, %v", p, got, err)
		}
	}
	// Messages that come twice are merged, and the last string counts.
	got, err := parsePull(append(full.encode(), pull{image: "other", username: "other"}.encode()...))
	want := full
	want.image, want.username = "other", "other"
	if err != nil || got != want {
		t.Errorf("merged to %+v, %v; want %+v", got, err, want)
	}
	for _, s := range []string{
		"0a",         // a tag and nothing
		"0a05616263", // longer than it is
		"0a030a0261", // the inner message's end is not there
		"0a030a01ff", // not UTF-8
		"0200",       // field 0
		"08",         // a varint without its bytes
	} {
		b, err := hex.DecodeString(s)
		must(t, err)
		if p, err := parsePull(b); err == nil {
			t.Errorf("%s is taken for %+v", s, p)
		}
	}
}

func TestPullConfig(t *testing.T) {
	for _, test := range []struct {
		p    pull
		want authn.AuthConfig
	}{
		{pull{}, authn.AuthConfig{}},
		{pull{password: "p"}, authn.AuthConfig{}},
		{pull{username: "u", password: "p", auth: "a", identityToken: "i", registryToken: "r"}, authn.AuthConfig{Username: "u", Password: "p"}},
		{pull{auth: "a", identityToken: "i", registryToken: "r"}, authn.AuthConfig{IdentityToken: "i"}},
		{pull{auth: "a", registryToken: "r"}, authn.AuthConfig{Auth: "a"}},
		{pull{registryToken: "r"}, authn.AuthConfig{RegistryToken: "r"}},
	} {
		if got := test.p.config(); got != test.want {
			t.Errorf("%+v: %+v, want %+v", test.p, got, test.want)
		}
	}
}

func TestMisdirected(t *testing.T) {
	for _, test := range []struct {
		image, address string
		want           bool
	}{
		{"r.example.com/app", "", false},
		{"r.example.com/app", "https://r.example.com", false},
		{"r.example.com/app", "http://r.example.com/v2/", false},
		{"r.example.com:5000/app", "https://r.example.com:5000", false},
		{"r.example.com:5000/app", "https://r.example.com", true},
		{"r.example.com/app", "https://evil.example.com", true},
		{"r.example.com/app", "https://r.example.com@evil.example.com", true},
		{"r.example.com/app", "r.example.com", true}, // containerd wants a scheme
		{"r.example.com/app", "r.example.com:5000", true},
		{"r.example.com/app", "%zz", true},
		{"debian", "https://index.docker.io/v1/", false},
		{"debian", "https://registry-1.docker.io", false},
		{"docker.io/library/debian", "https://docker.io", false},
		{"debian", "https://r.example.com", true},
		{"r.example.com/app", "https://docker.io", true},
	} {
		if got := (pull{image: test.image, serverAddress: test.address}).misdirected(); got != test.want {
			t.Errorf("%s at %q: %v, want %v", test.image, test.address, got, test.want)
		}
	}
}

// schema is what parsePull reads, for protobuf's own decoder.
func schema(t testing.TB) protoreflect.MessageDescriptor {
	const file = `
		name: "pull.proto" syntax: "proto3"
		message_type { name: "PullImageRequest"
			field { name: "image" number: 1 type: TYPE_MESSAGE type_name: ".ImageSpec" label: LABEL_OPTIONAL }
			field { name: "auth" number: 2 type: TYPE_MESSAGE type_name: ".AuthConfig" label: LABEL_OPTIONAL } }
		message_type { name: "ImageSpec"
			field { name: "image" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL } }
		message_type { name: "AuthConfig"
			field { name: "username" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "password" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "auth" number: 3 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "server_address" number: 4 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "identity_token" number: 5 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "registry_token" number: 6 type: TYPE_STRING label: LABEL_OPTIONAL } }`
	var d descriptorpb.FileDescriptorProto
	must(t, prototext.Unmarshal([]byte(file), &d))
	f, err := protodesc.NewFile(&d, nil)
	must(t, err)
	return f.Messages().ByName("PullImageRequest")
}

// FuzzParsePull holds the decoder against protobuf's: they take the same requests, and find the same in them.
func FuzzParsePull(f *testing.F) {
	f.Add(pull{"r.example.com/app:1", "user", "password", "auth", "https://r.example.com", "identity", "registry"}.encode())
	f.Add([]byte("\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b\x12\x04\x0b\x10\x01\x0c"))
	md := schema(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parsePull(b)
		m := dynamicpb.NewMessage(md)
		if e := proto.Unmarshal(b, m); (e == nil) != (err == nil) {
			t.Fatalf("%v here, %v from protobuf", err, e)
		}
		got.config()
		got.misdirected()
		if err != nil {
			return
		}
		var want pull
		field := func(message, name protoreflect.Name) string {
			inner := m.Get(md.Fields().ByName(message)).Message()
			return inner.Get(inner.Descriptor().Fields().ByName(name)).String()
		}
		want.image = field("image", "image")
		want.username, want.password, want.auth = field("auth", "username"), field("auth", "password"), field("auth", "auth")
		want.serverAddress = field("auth", "server_address")
		want.identityToken, want.registryToken = field("auth", "identity_token"), field("auth", "registry_token")
		if got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	})
}
